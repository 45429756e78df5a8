"""vpd trains the VP-Drafter of D2SD offline, from a cache of the target's hidden states.

    import vpd

    cache = vpd.open_cache("cache")
    for sequence in cache:
        print(sequence.row.seq_id, sequence.hidden_TKH.shape)

The import is quick: what the names of `__all__` need is imported at the first use of one of them.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .pipeline.api import (
        Cache,
        CachedSequence,
        DraftedSequence,
        Drafter,
        FirstDrafts,
        ReplayReport,
        TargetPieces,
        VpdError,
        anchors_of,
        create_first_drafts,
        draft_blocks,
        load_drafter,
        load_pieces,
        open_cache,
        open_first_drafts,
        redraft_blocks,
        replay,
        write_first_drafts,
    )

    __version__: str

__all__ = [
    "Cache",
    "CachedSequence",
    "DraftedSequence",
    "Drafter",
    "FirstDrafts",
    "ReplayReport",
    "TargetPieces",
    "VpdError",
    "__version__",
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


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("vpd")
    if name in __all__:
        return getattr(import_module(".pipeline.api", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
