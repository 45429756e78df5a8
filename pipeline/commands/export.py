"""`vpd export`."""

from __future__ import annotations

from pathlib import Path

from ...stages.export.card import NAMES
from ...stages.export.export import Exported, export_drafter
from ...stages.train.checkpoints import find_drafter
from ..output import emit, format_bytes


def run_export(drafter: str, out: Path, form: str, target: str | None, report: Path | None, as_json: bool) -> None:
    found = find_drafter(drafter)
    exported = export_drafter(found, out, form, target, report)
    result = {
        "folder": str(out),
        "format": form,
        "drafter": str(found),
        **exported._asdict(),
        "agreements": [agreement._asdict() for agreement in exported.agreements],
    }
    emit(result, as_json, describe_export(found, out, form, exported))


def describe_export(drafter: Path, out: Path, form: str, exported: Exported) -> str:
    """What was written, then how well its readers agree with the original."""
    name = NAMES.get(exported.training_mode, NAMES[None])
    lines = [
        f"{out}: the {name} {drafter} in the form {form}, {exported.num_parameters} parameters, "
        f"{format_bytes(sum(exported.num_bytes.values()))} in {', '.join(exported.num_bytes)}"
    ]
    lines += [
        f"{agreement.program} computes the same hidden states; largest difference {agreement.largest_difference:.1e} "
        "of the largest value"
        for agreement in exported.agreements
    ]
    return "\n".join(lines)
