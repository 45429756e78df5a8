"""`vpd draft`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...stages.draft.first_draft import FirstDrafting
from ...stages.train.checkpoints import find_drafter
from ..cache_facts import accept_length_histogram
from ..config import VpdConfig
from ..output import emit
from ..progress import ProgressReport
from ..reading import open_for_reading


def run_draft(place: str, first_drafter: str | Path, config: VpdConfig, as_json: bool) -> None:
    cache = open_for_reading(place, config.read)
    drafts = draft_over(cache, FirstDrafting(find_drafter(first_drafter), config.draft, config.read))
    histogram = accept_length_histogram(cache, drafts)
    result = {
        "fingerprint": drafts.fingerprint,
        "num_anchors": sum(histogram.values()),
        "accept_lengths": histogram,
    }
    emit(result, as_json, describe_drafting(result))


def draft_over(cache: Cache, drafting: FirstDrafting) -> FirstDrafts:
    """Drafts over all parts of the cache that are not drafted yet, with a progress report."""
    with ProgressReport("draft", len(cache), "anchors") as progress:
        return drafting.run(cache, progress.advance)


def describe_drafting(result: dict[str, Any]) -> str:
    num_anchors = result["num_anchors"]
    shares = ", ".join(f"{length}: {count / num_anchors:.0%}" for length, count in result["accept_lengths"].items())
    return f"first drafts {result['fingerprint']}: {num_anchors} anchors; accept lengths {shares or 'none'}"
