"""Work units: slices of the prompt set that any number of workers share through the cache's own storage.

A worker claims a unit by creating a lease, which only one can; it says that it lives by renewing one file of its own.
Nothing compares clocks of two hosts: a worker is dead for another one that has seen its file unchanged for too long.
A unit claimed twice costs time and nothing else, as a cache counts a repeated sequence once.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...data.cache.records import dump_record, parse_record
from ...data.cache.storage.base import Storage
from ...data.cache.work import DONE, WORK, read_units
from .conversations import Conversation

LEASE, WORKER = ".lease.json", ".worker.json"
HANG_SECONDS = 1800.0
"""A worker whose loop has not come round for so long hangs, its engine most likely."""


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """A slice of the prompt set, and what is left to do of it."""

    unit_id: str
    """Hash of the ids of the slice's records, done or not; 16 hex digits."""
    conversations: list[Conversation]


def split_units(seq_ids: Sequence[str], conversations: Sequence[Conversation], size: int) -> list[WorkUnit]:
    """The units of a prompt set that have something left to do.

    Args:
        seq_ids: of all records, in their order.
        size: records of a unit.
    """
    missing = {conversation.record.seq_id: conversation for conversation in conversations}
    units: list[WorkUnit] = []
    for start in range(0, len(seq_ids), size):
        ids = seq_ids[start : start + size]
        left = [missing[seq_id] for seq_id in ids if seq_id in missing]
        if left:
            units.append(WorkUnit(hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16], left))
    return units


class WorkBoard:
    """Claims units for one worker, one after the other, and takes over those of dead ones."""

    def __init__(
        self, storage: Storage, units: Sequence[WorkUnit], known: Mapping[str, dict[str, Any]], lease_seconds: float
    ):
        """
        Args:
            known: units that were finished before `units` were planned, and lack something since, with their records.
                One is finished again once its record is another.
            lease_seconds: a worker whose file has not changed for so long is dead.
        """
        self._storage, self._known, self._lease_seconds = storage, known, lease_seconds
        self._left = {unit.unit_id: unit for unit in units}
        self._worker = uuid.uuid4().hex[:12]
        self._held: dict[str, str] = {}
        self._seen: dict[str, tuple[bytes, float]] = {}
        self._last_round: float | None = None
        self._told_round: float | None = None
        self._over = threading.Event()
        self._beat()
        self._thread = threading.Thread(target=self._beat_on, name="vpd-lease", daemon=True)
        self._thread.start()

    @property
    def num_units_left(self) -> int:
        """Units that are neither claimed by this worker nor known to be finished."""
        return len(self._left)

    @property
    def num_left(self) -> int:
        """Conversations of those units."""
        return sum(len(unit.conversations) for unit in self._left.values())

    def claim(self) -> WorkUnit | None:
        """A unit that no living worker holds; None: there is none now, though others may still die."""
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

    def come_round(self) -> None:
        """Notes that the worker's loop goes on; from the first time on, units are held only while it does."""
        self._last_round = time.monotonic()

    def finish(self, unit_id: str, skipped: dict[str, str], facts: dict[str, Any]) -> None:
        """Records that a unit's sequences are committed.

        Args:
            skipped: its records that gave no sequence and never will, and why.
        """
        before = self._known[unit_id]["skipped"] if unit_id in self._known else {}
        record = {"worker": self._worker, "host": socket.gethostname(), "skipped": before | skipped, **facts}
        self._storage.write(f"{WORK}/{unit_id}{DONE}", dump_record(record))
        self._held.pop(unit_id, None)
        for name in self._storage.list_folder(WORK):
            if name.startswith(f"{unit_id}.") and name.endswith(LEASE):
                self._storage.remove(f"{WORK}/{name}")

    def close(self) -> None:
        """Gives back what is not finished."""
        self._over.set()
        self._thread.join()
        for name in self._held.values():
            self._storage.remove(name)
        self._storage.remove(f"{WORK}/{self._worker}{WORKER}")

    def _is_as_known(self, unit_id: str) -> bool:
        """Whether a unit has not been finished again since it was planned."""
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
        except FileNotFoundError:  # finished or given back just now
            return False
        if worker == self._worker:
            return False
        try:
            content = self._storage.read(f"{WORK}/{worker}{WORKER}")
        except FileNotFoundError:
            return True
        if lives_here(json.loads(content)) and not self._is_silent(worker, content):
            return False
        self._storage.remove(f"{WORK}/{worker}{WORKER}")  # it writes this again if it lives after all
        return True

    def _is_silent(self, worker: str, content: bytes) -> bool:
        """Whether a worker's file has not changed for too long, as this worker's clock has it."""
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
            with suppress(OSError):  # the next one may succeed; if none does, others take over
                self._beat()

    def _hangs(self) -> bool:
        """Whether others should take this worker's units over, as its loop does not come round; says so once.

        The process is left alone: a step may come back after all, and then goes on; who started it can end it.
        """
        last = self._last_round
        if last is None or not self._held or time.monotonic() - last < HANG_SECONDS:
            return False
        if self._told_round != last:
            self._told_round = last
            print(
                f"vpd: worker {self._worker} (process {os.getpid()} on {socket.gethostname()}) hangs: its engine has "
                f"not answered for {HANG_SECONDS / 60:.0f} minutes. Others may take over what it holds, "
                f"{', '.join(self._held)}. End it if it does not go on.",
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
    """False for a process that should be seen here but has ended; True if it lives, or can't be seen from here."""
    if worker.get("pid_space") != pid_space():
        return True
    return start_time(worker["pid"]) == worker["started"]


def pid_space() -> str:
    """Where a process number means what it means here: containers of one host may share its name and number anew."""
    try:
        boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux
        boot_id = namespace = ""
    return " ".join([socket.gethostname(), boot_id, namespace])


def start_time(pid: int) -> str | None:
    """When a process of this host started, to tell it from a later one of the same number; None: there is none."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The name, in parentheses, may hold anything; state and start time are the 1st and 20th field after it.
    fields = status.rpartition(")")[2].split()
    return None if fields[0] == "Z" else fields[19]
