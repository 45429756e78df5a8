"""What a drafter's run has recorded of its making, and what an evaluation has found."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from ...data.errors import DrafterError
from ..drafter.checkpoint import drafter_fingerprint
from ..holdout import RUN_CONFIG
from ..train.checkpoints import NAME, CheckpointResult, read_result, step_of
from ..trained_on import PROVENANCE


class Record(NamedTuple):
    """What is known of how a drafter was made; empty where it lies in no run's folder."""

    provenance: dict[str, Any]
    settings: dict[str, Any]
    """The run's settings, by section."""
    step: int | None
    result: CheckpointResult | None
    """What the run measured of this checkpoint."""

    @property
    def target(self) -> str | None:
        """The target as the run names it: a folder or a hub id."""
        return self.provenance.get("target")


def read_record(drafter: Path) -> Record:
    """
    Raises:
        DrafterError: a file of the run is damaged.
    """
    run = next((folder for folder in (drafter, *drafter.parents[:2]) if (folder / PROVENANCE).is_file()), None)
    if run is None:
        return Record({}, {}, None, None)
    provenance = _parse(run / PROVENANCE, json.loads)
    settings = _parse(run / RUN_CONFIG, yaml.safe_load) if (run / RUN_CONFIG).is_file() else {}
    step = step_of(drafter) if NAME.fullmatch(drafter.name) else None
    return Record(provenance, settings, step, read_result(drafter))


def read_report(path: Path, drafter: Path) -> dict[str, Any]:
    """Reads a result that `vpd eval --out` wrote.

    Raises:
        DrafterError: the file is damaged, or holds no result, or one of other drafters.
    """
    report = _parse(path, json.loads)
    drafters = report.get("drafters")
    if not isinstance(drafters, dict) or "by_nodes" not in report:
        raise DrafterError(
            f"{path}: expected a result of vpd eval with the keys drafters and by_nodes, found {sorted(report)[:6]}. "
            "Give a file that vpd eval --out wrote."
        )
    own = drafter_fingerprint(drafter)
    if own not in drafters.values():
        raise DrafterError(
            f"{path}: expected a result of the drafter {drafter} (fingerprint {own}), found one of {drafters}. "
            "Evaluate this checkpoint with vpd eval --out, or give its result."
        )
    return report


def read_architectures(target: str | None) -> list[str]:
    """The architectures of a target that is a local folder; else none."""
    path = Path(target or "") / "config.json"
    return _parse(path, json.loads).get("architectures") or [] if target and path.is_file() else []


def _parse(path: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise _damaged(path, error.strerror) from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise _damaged(path, error) from None
    if not isinstance(content, dict):
        raise _damaged(path, f"found {content!r:.40}")
    return content


def _damaged(path: Path, reason: object) -> DrafterError:
    reason = " ".join(str(reason).split())
    return DrafterError(f"{path}: expected a file of names and values, as vpd writes it: {reason}. Restore the file.")
