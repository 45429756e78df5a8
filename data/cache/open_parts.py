"""Parts that are open for reading, each opened once for many sequences."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Collection, Iterable

from .array_spec import ArraySpec
from .arrays import TOKEN_ARRAYS, constant_specs, names_by_range, state_specs
from .codecs import CODECS, HIDDEN
from .manifest import CacheManifest
from .part import OpenPart, open_part
from .storage.base import Storage

MAX_OPEN_STATES = 256


class OpenParts:
    """Opens parts when somebody reads them, and closes those not used for longest when too many are open."""

    def __init__(
        self, storage: Storage, root: str, specs: Iterable[ArraySpec], by_range: Collection[str], max_open: int
    ):
        """
        Args:
            root: where the parts are, as in `part_folder`.
            specs: all arrays of a part.
            by_range: names of the arrays that are read by byte range; the others are kept in memory.
        """
        self._storage, self._root, self._max_open = storage, root, max_open
        specs = [*specs]
        self._ranged = [spec for spec in specs if spec.name in by_range]
        self._resident = [spec for spec in specs if spec.name not in by_range]
        self._open: OrderedDict[str, OpenPart] = OrderedDict()
        self._verified: set[str] = set()
        self._opening: dict[str, threading.Lock] = {}
        self._lock = threading.Lock()

    def open(self, name: str, verify: bool) -> OpenPart:
        """A part; its files are verified the first time that `verify` is true.

        Raises:
            CacheCorruptError: a file is missing, or not what the commit record says.
        """
        with self._lock:
            opening = self._opening.setdefault(name, threading.Lock())
        with opening:  # threads that need the same part wait here while one of them opens the part
            with self._lock:
                must_verify = verify and name not in self._verified
                if name in self._open and not must_verify:
                    self._open.move_to_end(name)
                    return self._open[name]
            part = open_part(self._storage, self._root, name, self._ranged, self._resident, must_verify)
            with self._lock:
                self._open[name] = part
                self._verified |= {name} if must_verify else set()
                while len(self._open) > self._max_open:
                    self._open.popitem(last=False)
            return part

    def close(self) -> None:
        """Closes the files of all parts; a later read opens them again."""
        with self._lock:
            self._open.clear()


class OpenStates(OpenParts):
    """The parts of states of a cache, and what a reader needs to know to decode them."""

    def __init__(self, storage: Storage, manifest: CacheManifest):
        self.specs = state_specs(manifest)
        self.codec = CODECS[manifest.codec]
        self.hidden_size = manifest.hidden_size
        specs = [*self.specs.values(), *constant_specs(manifest).values()]
        super().__init__(storage, "", specs, {HIDDEN} | names_by_range(TOKEN_ARRAYS), MAX_OPEN_STATES)
