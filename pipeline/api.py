"""The Python API, which `import vpd` offers: functions for its users, and classes and functions of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..data.cache.cache import Cache
from ..data.cache.drafts import DraftedSequence, FirstDrafts
from ..data.cache.reader import CachedSequence
from ..data.errors import VpdError
from ..stages.draft.first_draft import FirstDrafting
from ..stages.draft.one_sequence import draft_blocks, redraft_blocks
from ..stages.drafter import checkpoint
from ..stages.drafter.blocks import anchors_of
from ..stages.drafter.model import Drafter
from ..stages.drafter.target_pieces import TargetPieces
from ..stages.evaluate.plan import plan_replay
from ..stages.evaluate.report import ReplayReport
from ..stages.holdout import held_out_rows
from ..stages.train.checkpoints import find_drafter
from .config import load_config
from .reading import open_for_reading

__all__ = [
    "Cache",
    "CachedSequence",
    "DraftedSequence",
    "Drafter",
    "FirstDrafts",
    "ReplayReport",
    "TargetPieces",
    "VpdError",
    "anchors_of",
    "create_first_drafts",
    "draft_blocks",
    "load_drafter",
    "load_pieces",
    "open_cache",
    "open_first_drafts",
    "redraft_blocks",
    "replay",
    "write_first_drafts",
]


def open_cache(place: str | Path, **read: Any) -> Cache:
    """Opens a cache for reading. Iterating over it gives its sequences, each as tensors in memory of its own.

    Args:
        place: a folder, or `s3://`, `gs://`, `az://`.
        read: settings of `read`, such as `local_parts="/local"`, which keeps parts of a remote cache on the disk.

    Raises:
        CacheNotFoundError: there is no cache, or it holds no committed sequence.
        CacheCorruptError: something that was committed is missing.
        ConfigError: a setting is wrong.
    """
    return open_for_reading(str(place), _section("read", read))


def open_first_drafts(cache: Cache, fingerprint: str | None = None) -> FirstDrafts:
    """Opens first drafts for reading: `first_drafts.read(row)` gives a sequence's drafts as tensors.

    Args:
        fingerprint: how the first drafter's fingerprint begins; None: the cache has the drafts of one drafter only.

    Raises:
        CacheNotFoundError: there are none, none of that name, or several to choose from.
    """
    return FirstDrafts.open(cache, fingerprint)


def write_first_drafts(cache: Cache, first_drafter: str | Path, **draft: Any) -> FirstDrafts:
    """Drafts over all parts of the cache that this drafter has not drafted yet, as `vpd draft` does.

    Args:
        first_drafter: a checkpoint, a run, or a hub id.
        draft: settings of `draft`, such as `stride=2` or `device="cpu"`.

    Raises:
        DrafterError: there is no such drafter, or it does not fit the cache.
        ConfigError: a setting is wrong.
    """
    return FirstDrafting(find_drafter(first_drafter), _section("draft", draft)).run(cache)


def create_first_drafts(cache: Cache, fingerprint: str, facts: Mapping[str, Any]) -> FirstDrafts:
    """Opens first drafts for writing drafts of your own, part by part; creates them at the first time.

    For each of `first_drafts.missing_parts()`, `with first_drafts.writer(part) as writer` takes the arrays of each
    sequence of `cache.rows_of_part(part)` in turn (`writer.append(arrays)`), and `writer.commit(facts)` publishes
    them. `FirstDrafts.read_arrays` returns the arrays of a sequence in the same form.

    Args:
        fingerprint: hex digits that name your drafter.
        facts: what describes your drafter; `name`, `block_size` and `stride` are needed.
    """
    return FirstDrafts.create_or_open(cache, fingerprint, facts)


def load_drafter(
    drafter: str | Path,
    *,
    cache: Cache | None = None,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Drafter:
    """Loads a drafter.

    Args:
        drafter: a checkpoint, a run (its best checkpoint, else its latest), or a hub id.
        cache: needed for a checkpoint with copies of the target's weights, which must be those of the cache's target.

    Raises:
        DrafterError: there is no such drafter, or its files do not fit each other.
    """
    target_folder = None if cache is None else cache.target_folder
    return checkpoint.load_drafter(find_drafter(drafter), target_folder=target_folder, device=device, dtype=dtype)


def load_pieces(
    cache: Cache, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> TargetPieces:
    """Loads the target's embedding and LM head from the cache, which every drafter needs.

    Raises:
        CacheCorruptError: the files in the cache are missing or damaged.
    """
    return TargetPieces.load(cache.target_folder, device=device, dtype=dtype)


def replay(
    cache: Cache,
    first: str | Path | FirstDrafts,
    second: str | Path | None = None,
    **evaluation: Any,
) -> ReplayReport:
    """Measures the acceptance length on held-out sequences by replay, as `vpd eval` does.

    Args:
        first: the first drafter (a checkpoint, a run, or a hub id), or recorded first drafts.
        second: the VP-Drafter; None: the first drafter is replayed alone.
        evaluation: settings of `eval`, such as `k=8` or `holdout=0.1`.

    Raises:
        CacheNotFoundError: no held-out sequence can be replayed, or a part of the cache lacks first drafts.
        DrafterError: a drafter is missing or does not fit the cache.
        ConfigError: a setting is wrong.
    """
    first = first if isinstance(first, FirstDrafts) else find_drafter(first)
    checkpoint = None if second is None else find_drafter(second)
    config = _section("eval", evaluation)
    drafters = [each for each in (first, checkpoint) if isinstance(each, Path)]
    rows = held_out_rows(cache, drafters, config.holdout)
    return plan_replay(cache, rows, first, config).run(checkpoint)


def _section(name: str, settings: Mapping[str, Any]) -> Any:
    """One section of the settings, checked as the command line checks it."""
    return getattr(load_config(None, {f"{name}.{key}": value for key, value in settings.items()}), name)
