"""What is replayed: first drafter or recorded first drafts, second drafter, sequences and settings in one place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceRow
from ...data.errors import CacheNotFoundError
from ..config import ReadConfig
from ..drafter.checkpoint import check_drafter
from .config import EvalConfig
from .replay import Replay, require_all_anchors, require_replayable
from .report import ReplayReport


@dataclass(frozen=True, slots=True)
class ReplayPlan:
    """A replay that any number of drafters can take part in; `plan_replay` makes it."""

    cache: Cache
    rows: Sequence[SequenceRow]
    """Sequences to replay; `config.limit` may cut them short."""
    first: Path | FirstDrafts | None
    """The first drafter's folder, or recorded first drafts. None: the drafter given to `run` is the first drafter."""
    config: EvalConfig
    read: ReadConfig
    brief: bool
    """Replays the ways of the headline alone, see `Replay`."""

    def run(self, drafter: Path | None, on_sequence: Callable[[], None] = lambda: None) -> ReplayReport:
        """Replays a drafter: as the second drafter beside `first`, or as the first drafter if there is no `first`.

        Args:
            drafter: a checkpoint's folder. None: the first drafter is replayed alone.
            on_sequence: called after each sequence.

        Raises:
            CacheNotFoundError: no sequence can be replayed.
            DrafterError: a drafter does not fit the cache.
            ValueError: neither `first` nor `drafter` is given.
        """
        first, second = (drafter, None) if self.first is None else (self.first, drafter)
        if first is None:
            raise ValueError("expected a first drafter or a drafter, found neither.")
        return Replay(self.cache, first, second, self.config, self.read, self.brief).run(self.rows, on_sequence)


def plan_replay(
    cache: Cache,
    rows: Sequence[SequenceRow],
    first: Path | FirstDrafts | None,
    config: EvalConfig,
    read: ReadConfig | None = None,
    brief: bool = False,
) -> ReplayPlan:
    """Checks what can be checked before a replay.

    Args:
        brief: replays the ways of the headline alone, see `Replay`.

    Raises:
        CacheNotFoundError: no sequence can be replayed, or a part of the cache lacks recorded first drafts.
        DrafterError: the first drafter does not fit the cache, or its recorded drafts leave out anchors.
    """
    if isinstance(first, Path):
        check_drafter(first, cache.manifest)
    require_replayable(cache, rows[: config.limit])
    if isinstance(first, FirstDrafts):
        require_complete(first)
        require_all_anchors(first)
    return ReplayPlan(cache, rows, first, config, read or ReadConfig(), brief)


def require_complete(drafts: FirstDrafts) -> None:
    """
    Raises:
        CacheNotFoundError: a part of the cache has no first drafts.
    """
    if missing := drafts.missing_parts():
        cache = drafts.cache
        raise CacheNotFoundError(
            f"the first drafts {drafts.fingerprint} lack {len(missing)} of {len(cache.parts)} parts of "
            f"{cache.place}. Complete them: vpd draft {cache.place} --first-drafter DIR."
        )
