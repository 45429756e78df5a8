"""Writes finished sequences in a separate thread, while the engine goes on."""

# T tokens that entered the target
from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ...data.cache.maintenance.quarantine import LISTS, list_quarantined
from ...data.cache.writer import StateWriter
from ...data.errors import ExtractionError
from ...data.prompts.records import PromptRecord
from .conversations import FinishedSequence
from .left_out import LeftOut
from .units import PreparedUnit, WorkBoard

LEAST_CONFIRMED, MIN_CHECKED = 0.5, 20
"""Share of the greedy choices that the stored states must confirm, if at least so many were compared. Rounding to
bfloat16 turns some choices; states of other tokens or layers turn nearly all of them."""
MIN_QUARANTINED = 3
"""Number of sequences that may go into quarantine even if their share is larger than allowed."""


@dataclass
class ExtractReport:
    """What a run did."""

    num_present: int = 0
    """Sequences that the cache already held."""
    num_written: int = 0
    num_tokens: int = 0
    num_checked: int = 0
    """Greedy choices of the engine that were compared with the argmax of the stored states."""
    num_argmax_differing: int = 0
    num_left: int = 0
    """Sequences that the run did not make, because it was stopped."""
    stopped_by: int | None = None
    """The signal that came while the run extracted, whether or not sequences are left."""
    left_out: LeftOut = field(default_factory=LeftOut)
    """Records without a sequence."""
    rules: Counter[str] = field(default_factory=Counter)
    """Name of a rule of reading -> records that it was applied to."""
    written_ids: list[str] = field(default_factory=list)
    audit: dict[str, Any] | None = None
    """What the audit found; with several workers, the audit with the worst error."""

    @property
    def skipped(self) -> Counter[str]:
        """Records without a sequence, by reason."""
        return self.left_out.counts

    def count(self, unit: PreparedUnit) -> None:
        """Counts the rows of a unit that are present or left out."""
        self.num_present += unit.num_present
        self.left_out.counts.update(unit.hopeless.values())
        self.left_out.update(unit.left_out)
        self.rules.update(unit.rules)

    def require_confirmed(self) -> None:
        """
        Raises:
            ExtractionError: the stored states do not lead to the target's choices.
        """
        confirmed = self.num_checked - self.num_argmax_differing
        if self.num_checked >= MIN_CHECKED and confirmed < LEAST_CONFIRMED * self.num_checked:
            raise ExtractionError(
                f"of {self.num_checked} greedy choices compared, the stored states confirm {confirmed}: the states are "
                "not those that led to the choices. Do not train on this cache. Extract into another folder with "
                "another engine (--engine transformers) or --dtype float32."
            )

    def to_json(self) -> dict[str, Any]:
        names = ("num_written", "num_present", "num_checked", "num_argmax_differing", "num_left", "audit")
        return {
            **{name: getattr(self, name) for name in names},
            "skipped": dict(self.skipped),
            "first_skipped": [*self.left_out.firsts.values()],
            "rules": dict(self.rules),
        }


@dataclass(frozen=True, slots=True)
class Outcome:
    """A record's sequence, or the reason why there is none."""

    unit_id: str
    record: PromptRecord
    sequence: FinishedSequence | None = None
    reason: str = ""
    is_fault: bool = False
    """Whether the engine caused the reason, so that the record is worth another try."""


class Sink:
    """Takes outcomes, writes sequences, and reports committed units to the board."""

    def __init__(
        self,
        writer: StateWriter,
        board: WorkBoard,
        report: ExtractReport,
        max_quarantined: float,
        on_sequence: Callable[[int], None],
    ):
        """
        Args:
            max_quarantined: share of the sequences that may go into quarantine before the run ends.
        """
        self._writer, self._board, self._report = writer, board, report
        self._max_quarantined, self._on_sequence = max_quarantined, on_sequence
        self._left: Counter[str] = Counter()
        self._skipped: dict[str, dict[str, str]] = {}
        self._units: dict[str, PreparedUnit] = {}
        self._complete: list[str] = []
        self._num_faults = 0
        self._queue: queue.SimpleQueue[Outcome | Callable[[], None] | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="vpd-writer", daemon=True)
        self._thread.start()

    @property
    def num_waiting(self) -> int:
        """Outcomes that wait for the thread."""
        return self._queue.qsize()

    def expect(self, unit: PreparedUnit) -> None:
        """Announces a unit; call this before its outcomes are put."""
        self._units[unit.unit_id] = unit
        self._left[unit.unit_id] = len(unit.conversations)
        self._skipped[unit.unit_id] = {}

    def put(self, outcome: Outcome) -> None:
        """
        Raises:
            StorageError, ExtractionError: the thread has ended with this error.
        """
        self.check()
        self._queue.put(outcome)

    def check(self) -> None:
        """
        Raises:
            StorageError, ExtractionError: the thread has ended with this error.
        """
        if self._error is not None:
            raise self._error

    def commit(self) -> None:
        """Asks the thread to commit all outcomes put so far, so that other workers see them; returns at once."""
        self._queue.put(self._commit)

    def close(self) -> None:
        """Writes and commits all outcomes, and ends the thread.

        Raises:
            StorageError, ExtractionError: the thread has ended with this error.
        """
        self._queue.put(None)
        self._thread.join()
        self._writer.finish()
        self._finish_units()
        self.check()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if self._error is None:
                try:
                    self._process(item) if isinstance(item, Outcome) else item()
                except BaseException as error:
                    self._complete.clear()  # the part that failed may hold sequences of these units
                    self._error = error

    def _commit(self) -> None:
        self._writer.commit()
        self._finish_units()

    def _process(self, outcome: Outcome) -> None:
        reason, is_fault = outcome.reason, outcome.is_fault
        if outcome.sequence is not None:
            self._report.num_checked += outcome.sequence.num_checked
            self._report.num_argmax_differing += outcome.sequence.num_argmax_differing
            reason, is_fault = find_fault(outcome.sequence)
        committed = False
        if reason:
            self._skip(outcome, reason, is_fault)
        elif outcome.sequence is not None:
            committed = self._write(outcome.sequence)
        self._left[outcome.unit_id] -= 1
        if not self._left[outcome.unit_id]:
            self._complete.append(outcome.unit_id)
        if committed:
            self._finish_units()

    def _write(self, sequence: FinishedSequence) -> bool:
        """Returns whether a part was committed, which includes the sequence."""
        part = self._writer.append(sequence.as_new(), sequence.hidden_TKH)
        self._report.num_written += 1
        self._report.num_tokens += len(sequence.token_ids)
        self._report.written_ids.append(sequence.record.seq_id)
        self._on_sequence(len(sequence.token_ids))
        return part is not None

    def _skip(self, outcome: Outcome, reason: str, is_fault: bool) -> None:
        """
        Raises:
            ExtractionError: too many of the run's sequences are in quarantine.
        """
        record, report = outcome.record, self._report
        report.left_out.add(reason, f"{record.source}, row {record.row}", reason)
        if not is_fault:
            self._skipped[outcome.unit_id][record.seq_id] = reason
            return
        storage = self._writer.cache.storage
        list_quarantined(
            storage, [{"seq_id": record.seq_id, "source": record.source, "row": record.row, "reason": reason}]
        )
        self._num_faults += 1
        done = report.num_written + self._num_faults
        if self._num_faults > max(MIN_QUARANTINED, self._max_quarantined * done):
            raise ExtractionError(
                f"{self._num_faults} of {done} sequences were put into quarantine, the last of them because of "
                f"{reason}; {storage.place}/{LISTS} lists them. Check the target's weights and dtype, or allow more "
                "sequences with extract.max_quarantined. What was written before is kept."
            )

    def _finish_units(self) -> None:
        """Reports the complete units as finished; call this when all that was appended is committed."""
        complete, self._complete = self._complete, []
        for unit_id in complete:
            self._board.finish(self._units.pop(unit_id), self._skipped.pop(unit_id))


def find_fault(sequence: FinishedSequence) -> tuple[str, bool]:
    """The reason why a sequence can't be stored, empty if it can; and whether the engine caused the reason."""
    num_tokens = len(sequence.token_ids)
    if sequence.prompt_len >= num_tokens:
        return "empty response", False
    if len(sequence.hidden_TKH) != num_tokens or len(sequence.target_argmax) != num_tokens:
        return "states of another length", True
    if not torch.isfinite(sequence.hidden_TKH).all():
        return "states that are not finite", True
    if not any(sequence.loss_mask):
        return "nothing but thinking", False
    return "", False
