"""Work units: slices of the prompt set that any number of workers share through the cache's own storage.

A worker claims a unit by creating a lease, a file that only one worker can create. A living worker writes a new
heartbeat to its own file from time to time. A worker counts as dead when its file has not changed for too long, by the
clock of the worker that looks; clocks of two hosts are never compared. If two workers do the same unit, this costs only
time, because a cache counts a repeated sequence once.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ...data.cache.records import dump_record, parse_record
from ...data.cache.storage.base import Storage
from ...data.cache.work import DONE, WORK, read_units
from .conversations import Conversation
from .left_out import LeftOut

LEASE, WORKER = ".lease.json", ".worker.json"
HANG_SECONDS = 1800.0
"""A worker hangs if its loop has made no progress for this time; the reason is mostly its engine."""


@dataclass(frozen=True, slots=True)
class PreparedUnit:
    """A unit whose rows were read, and the part of them that is left to do."""

    unit_id: str
    conversations: list[Conversation]
    sequences: list[str] = field(default_factory=list)
    """Ids of all sequences of the unit, done or not."""
    hopeless: dict[str, str] = field(default_factory=dict)
    """Id -> reason of the records that, as an earlier run found, never give a sequence."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Rows without a sequence of their own; without the hopeless ones."""
    rules: Counter[str] = field(default_factory=Counter)
    """Name of a rule of reading -> rows that it was applied to."""

    @property
    def num_present(self) -> int:
        """Sequences that the cache already held."""
        return len(self.sequences) - len(self.conversations)

    @property
    def num_rows(self) -> int:
        return len(self.sequences) + len(self.hopeless) + self.left_out.counts.total()


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A slice of the prompt set that one worker does."""

    unit_id: str
    """The slice's key; 16 hex digits."""
    rows: Sequence[int]
    """Numbers of the slice's rows."""
    prepared: PreparedUnit | None = None
    """None until somebody reads the rows, which may be after the claim."""

    @property
    def num_left(self) -> int:
        """Records that are left to do; if nobody has read the rows, there may be fewer."""
        return len(self.rows) if self.prepared is None else len(self.prepared.conversations)


class WorkBoard:
    """Claims units for one worker, one after the other, and takes over the units of dead workers."""

    def __init__(
        self, storage: Storage, units: Sequence[WorkUnit], known: Mapping[str, dict[str, Any]], lease_seconds: float
    ):
        """
        Args:
            known: id -> record of the units that were finished when `units` were planned. Such a unit is done again if
                it is among `units`; it is finished again when its record differs from the known one.
            lease_seconds: time without a new heartbeat after which a worker is dead.
        """
        self._storage, self._known, self._lease_seconds = storage, known, lease_seconds
        self._left = {unit.unit_id: unit for unit in units}
        self._worker = uuid.uuid4().hex[:12]
        self._held: dict[str, str] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._last_progress: float | None = None
        self._reported_progress: float | None = None
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._beat_on, name="vpd-lease", daemon=True)
        self._thread.start()

    @property
    def num_units_left(self) -> int:
        """Units that this worker has not claimed and does not know to be finished."""
        return len(self._left)

    @property
    def num_left(self) -> int:
        """Records of those units."""
        return sum(unit.num_left for unit in self._left.values())

    def claim(self) -> WorkUnit | None:
        """Claims a unit that no living worker holds; None if there is none now, which changes if a worker dies."""
        present = self._storage.list_folder(WORK)
        finished = {name.removesuffix(DONE) for name in present if name.endswith(DONE)}
        leases: dict[str, list[int]] = {}
        for name in present:
            if name.endswith(LEASE):
                unit_id, _, generation = name.removesuffix(LEASE).partition(".")
                leases.setdefault(unit_id, []).append(int(generation))
        for unit_id, unit in list(self._left.items()):
            if unit_id in finished and not self._is_as_known(unit_id):
                del self._left[unit_id]
                continue
            generation = max(leases.get(unit_id, [-1]))
            if (generation < 0 or self._is_free(unit_id, generation)) and self._create(unit_id, generation + 1):
                del self._left[unit_id]
                return unit
        return None

    def note_progress(self) -> None:
        """Notes that the worker's loop goes on. After a first call, the worker loses its units if no call follows."""
        self._last_progress = time.monotonic()

    def finish(self, unit: PreparedUnit, skipped: Mapping[str, str]) -> None:
        """Records that a unit's sequences are committed.

        Args:
            skipped: id -> reason of the unit's conversations that never give a sequence.
        """
        unit_id = unit.unit_id
        before = self._known[unit_id]["skipped"] if unit_id in self._known else {}
        record = {
            "worker": self._worker,
            "host": socket.gethostname(),
            "skipped": {**before, **unit.hopeless, **skipped},
            "sequences": unit.sequences,
            "left_out": dict(unit.left_out.counts),
            "rules": dict(unit.rules),
        }
        self._storage.write(f"{WORK}/{unit_id}{DONE}", dump_record(record))
        self._held.pop(unit_id, None)
        for name in self._storage.list_folder(WORK):
            if name.startswith(f"{unit_id}.") and name.endswith(LEASE):
                self._storage.remove(f"{WORK}/{name}")

    def close(self) -> None:
        """Gives the unfinished units back."""
        self._over.set()
        self._thread.join()
        for name in self._held.values():
            self._storage.remove(name)
        self._storage.remove(f"{WORK}/{self._worker}{WORKER}")

    def _is_as_known(self, unit_id: str) -> bool:
        """Whether a unit's record is still the known one, so that the unit was not finished again."""
        return unit_id in self._known and read_units(self._storage, [unit_id]) == {unit_id: self._known[unit_id]}

    def _create(self, unit_id: str, generation: int) -> bool:
        name = f"{WORK}/{unit_id}.{generation}{LEASE}"
        try:
            self._storage.create(name, dump_record({"worker": self._worker}))
        except FileExistsError:
            return False
        self._held[unit_id] = name
        return True

    def _is_free(self, unit_id: str, generation: int) -> bool:
        """Whether the worker that holds a lease is dead."""
        name = f"{WORK}/{unit_id}.{generation}{LEASE}"
        try:
            worker = parse_record(self._storage.read(name), self._storage.locate(name), "a lease")["worker"]
        except FileNotFoundError:  # the unit was just finished or given back
            return False
        if worker == self._worker:
            return False
        try:
            content = self._storage.read(f"{WORK}/{worker}{WORKER}")
        except FileNotFoundError:
            return True
        if lives_here(json.loads(content)) and not self._is_silent(worker, content):
            return False
        self._storage.remove(f"{WORK}/{worker}{WORKER}")  # a worker that still lives writes its file again
        return True

    def _is_silent(self, worker: str, content: bytes) -> bool:
        """Whether a worker's file has not changed for too long, by this worker's clock."""
        now = time.monotonic()
        before, since = self._seen.get(worker, (b"", now))
        if before != content:
            self._seen[worker] = (content, now)
            return False
        return now - since > self._lease_seconds

    def _beat_on(self) -> None:
        while not self._over.wait(self._lease_seconds / 4):
            if self._hangs():
                continue
            with suppress(OSError):  # the next heartbeat may succeed; if none does, other workers take over
                self._beat()

    def _hangs(self) -> bool:
        """Whether this worker's loop makes no progress, so that others should take over its units; reports this once.

        The process is not ended: its engine may answer after all, and the worker then goes on.
        """
        last = self._last_progress
        if last is None or not self._held or time.monotonic() - last < HANG_SECONDS:
            return False
        if self._reported_progress != last:
            self._reported_progress = last
            print(
                f"vpd: worker {self._worker} (process {os.getpid()} on {socket.gethostname()}) hangs: its engine has "
                f"not answered for {HANG_SECONDS / 60:.0f} minutes. Other workers may take over its units, "
                f"{', '.join(self._held)}. End the process if it does not go on.",
                file=sys.stderr,
                flush=True,
            )
        return True

    def _beat(self) -> None:
        pid = os.getpid()
        record = {"host": socket.gethostname(), "pid_space": pid_space(), "pid": pid, "started": start_time(pid)}
        record["beat"] = uuid.uuid4().hex[:8]
        self._storage.write(f"{WORK}/{self._worker}{WORKER}", dump_record(record))


def lives_here(worker: dict[str, Any]) -> bool:
    """Whether a worker's process lives; True, too, if the process can't be seen from here."""
    if worker.get("pid_space") != pid_space():
        return True
    return start_time(worker["pid"]) == worker["started"]


def pid_space() -> str:
    """Name of the space in which this process's number is unique.

    The host's name is not enough: containers may share the host's name, and each container has its own numbers.
    """
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # no Linux
        boot_id = namespace = ""
    return " ".join([socket.gethostname(), boot_id, namespace])


def start_time(pid: int) -> str | None:
    """When a process of this host started, which separates it from a later process of the same number.

    Returns:
        Clock ticks since the host's start, as text; None if there is no such process.
    """
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The process's name, in parentheses, may hold any character. State and start time are fields 1 and 20 after it.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
