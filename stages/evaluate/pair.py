"""Checks that two drafters are given in the order in which they were trained to draft."""

from __future__ import annotations

from pathlib import Path

from ...data.errors import DrafterError
from ..drafter.checkpoint import CONFIG, drafter_fingerprint, read_json

FIRST, SECOND = "dflash", "vp_drafter"


def training_mode(drafter: Path) -> str | None:
    """What the drafter was trained as, `dflash` or `vp_drafter`; None if its config does not say."""
    dflash = read_json(drafter / CONFIG).get("dflash_config") or {}
    return dflash.get("training_mode") or dflash.get("loss_type")


def check_pair(first: Path, second: Path | None) -> list[str]:
    """Warnings about the order of the drafters.

    Raises:
        DrafterError: the drafters are swapped.
    """
    first_mode, second_mode = training_mode(first), None if second is None else training_mode(second)
    if first_mode == SECOND and second_mode == FIRST:
        raise DrafterError(
            f"the drafters are swapped: {first} is given as the first drafter and was trained as a VP-Drafter "
            f"(training_mode {SECOND}), {second} the other way round. Exchange --first-drafter and --drafter."
        )
    warnings = []
    if first_mode == SECOND:
        warnings.append(f"the first drafter {first} was trained as a VP-Drafter (training_mode {SECOND})")
    if second is None:
        return warnings
    if first.resolve() == second.resolve() or drafter_fingerprint(first) == drafter_fingerprint(second):
        warnings.append(f"{second} is both drafters, so d2sd is the same as first_as_second")
    elif second_mode == FIRST:
        warnings.append(f"the second drafter {second} was trained as a first drafter (training_mode {FIRST})")
    return warnings
