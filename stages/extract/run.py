"""Stage one as one of any number of workers: prompts go through the target, and its states into the cache."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import Any

from ...data.cache.cache import Cache
from ...data.cache.work import note_audit
from ...data.cache.writer import StateWriter
from ...data.errors import PromptError
from .audit import audit, is_audited
from .config import ExtractConfig
from .conversations import Conversation, SequenceTooLong
from .engine import ABORTED, Completion, Engine, EngineRequest
from .plan import ExtractPlan
from .sink import ExtractReport, Outcome, Sink
from .units import PreparedUnit, WorkBoard, WorkUnit

SECONDS_BETWEEN_CLAIMS = 1.0
"""Waiting time while other workers hold all units that are left."""


def extract(
    engine_factory: Callable[[], Engine],
    cache: Cache,
    plan: ExtractPlan,
    config: ExtractConfig,
    on_sequence: Callable[[int, str], None] = lambda num_tokens, note: None,
    must_stop: Callable[[], bool] = lambda: False,
) -> ExtractReport:
    """Writes the plan's sequences, except those that other workers write. The engine starts when there is work to do.

    The sequences that were finished are committed even if the run ends with an error.

    Args:
        on_sequence: called for each sequence that is written, with its number of tokens and the lengths of the queues,
            and with 0 tokens for each row that is left out after its unit was claimed.
        must_stop: once this is true, no sequence is started, and the started ones have `config.stop_seconds` to finish.

    Raises:
        PromptError: a later turn of a record can't be used (unless `config.skip_bad`).
        ExtractionError: the engine failed, or too many sequences were put into quarantine.
    """
    report = plan.report
    if not plan.num_left:
        return report
    board = WorkBoard(cache.storage, plan.units, plan.known_units, config.machinery.lease_seconds)
    worker = Worker(board, plan, config, must_stop, on_sequence)
    try:
        if worker.wait_for_work():
            work(worker, engine_factory, cache, plan, config, on_sequence)
    finally:
        board.close()
    report.num_left = worker.num_open + board.num_left
    return report


def work(
    worker: Worker,
    engine_factory: Callable[[], Engine],
    cache: Cache,
    plan: ExtractPlan,
    config: ExtractConfig,
    on_sequence: Callable[[int, str], None],
) -> None:
    """One worker's part, from the start of its engine to the last commit."""
    engine = engine_factory()
    try:
        facts = {"engine": engine.facts, "prompt_set": plan.prompt_set}
        sink = Sink(
            StateWriter(cache, config.part_mib << 20, facts),
            worker.board,
            plan.report,
            config.max_quarantined,
            lambda num_tokens: on_sequence(num_tokens, worker.describe(sink)),
        )
        try:
            worker.run(engine, sink)
        finally:
            sink.close()
        if not worker.is_stopping:
            plan.report.audit = audit_written(engine, cache, plan.report.written_ids, config.audit)
    finally:
        engine.close()


def audit_written(engine: Engine, cache: Cache, seq_ids: list[str], share: float) -> dict[str, Any] | None:
    """Audits a share of the sequences that a run has written, and stores the result with the cache.

    Returns:
        What `audit` found; None if no sequence belongs to the share.
    """
    chosen = {seq_id for seq_id in seq_ids if is_audited(seq_id, share)}
    if not chosen:
        return None
    written = Cache.open(cache.storage)
    found = audit(engine, written, [row for row in written.rows if row.seq_id in chosen])
    note_audit(cache.storage, found)
    return found


class Worker:
    """Keeps an engine busy with the conversations of the units that it claims."""

    def __init__(
        self,
        board: WorkBoard,
        plan: ExtractPlan,
        config: ExtractConfig,
        must_stop: Callable[[], bool],
        on_sequence: Callable[[int, str], None],
    ):
        self.board, self._plan, self._config, self._must_stop = board, plan, config, must_stop
        self._on_sequence = on_sequence
        self._unit: PreparedUnit | None = None
        self._backlog: deque[tuple[str, Conversation]] = deque()
        self._running: dict[str, tuple[str, Conversation]] = {}
        self._num_aborted = 0
        self._next_claim = 0.0
        self._started_stopping: float | None = None
        self._failure: PromptError | None = None

    @property
    def is_stopping(self) -> bool:
        """Whether no further sequence may start."""
        return self._must_stop() or self._failure is not None

    @property
    def num_open(self) -> int:
        """Conversations of claimed units that have neither a sequence nor a reason why there is none."""
        num_started = len(self._running) + self._num_aborted
        return num_started + len(self._backlog) + (len(self._unit.conversations) if self._unit else 0)

    def describe(self, sink: Sink) -> str:
        return f"{len(self._running)} in the engine, {sink.num_waiting} to be written"

    def wait_for_work(self) -> bool:
        """Claims a first unit; waits while other workers hold all units, since they may die.

        Returns:
            Whether a unit was claimed; if not, nothing is left to do.

        Raises:
            PromptError: a record can't be used.
        """
        while self._unit is None and self.board.num_units_left and not self.is_stopping:
            self._unit = self._claim()
            if self._unit is None and self._failure is None:
                time.sleep(SECONDS_BETWEEN_CLAIMS)
        if self._failure is not None:
            raise self._failure
        return self._unit is not None

    def run(self, engine: Engine, sink: Sink) -> None:
        """Works until nothing is left, or until the time to stop is over.

        Raises:
            PromptError: a record can't be used. The conversations that were in the engine are finished first.
        """
        self._run(engine, sink)
        if self._failure is not None:
            raise self._failure

    def _run(self, engine: Engine, sink: Sink) -> None:
        while not self._is_out_of_time():
            self.board.note_progress()
            sink.check()
            self._submit(engine, sink)
            if self._running:
                for completion in engine.poll():
                    self._advance(completion, engine, sink)
            elif self.is_stopping or not (self._backlog or self.board.num_units_left):
                return
            elif sink.num_waiting:  # the next requests need the memory of what waits for the writer
                time.sleep(0.01)
            elif not self._backlog:  # other workers hold the rest, and wait until these sequences are committed
                sink.commit()
                time.sleep(SECONDS_BETWEEN_CLAIMS)

    def _is_out_of_time(self) -> bool:
        if not self.is_stopping:
            return False
        if self._started_stopping is None:
            self._started_stopping = time.monotonic()
        return time.monotonic() - self._started_stopping > self._config.stop_seconds

    def _submit(self, engine: Engine, sink: Sink) -> None:
        """Submits requests up to the limit, which counts what waits for the writer too, as both take memory."""
        limit = self._config.machinery.max_in_flight
        while not self.is_stopping and len(self._running) + sink.num_waiting < limit:
            if not self._backlog and not self._take_unit(sink):
                return
            unit_id, conversation = self._backlog.popleft()
            request = conversation.first_request()
            self._running[request.key] = unit_id, conversation
            engine.submit(request)

    def _take_unit(self, sink: Sink) -> bool:
        unit, self._unit = self._unit, None
        if unit is None and self.board.num_units_left and time.monotonic() >= self._next_claim:
            unit = self._claim()
            self._next_claim = 0.0 if unit else time.monotonic() + SECONDS_BETWEEN_CLAIMS
        if unit is None:
            return False
        sink.expect(unit)
        self._backlog += [(unit.unit_id, conversation) for conversation in unit.conversations]
        return True

    def _claim(self) -> PreparedUnit | None:
        """Claims a unit that has something left to do, and prepares it; None if there is none now.

        A unit of which nothing is left is finished at once.
        """
        while not self.is_stopping and (unit := self.board.claim()) is not None:
            prepared = unit.prepared or self._prepare(unit)
            if prepared is None:
                return None
            if prepared.conversations:
                return prepared
            self.board.finish(prepared, {})
        return None

    def _prepare(self, unit: WorkUnit) -> PreparedUnit | None:
        """Reads a unit's rows; None if a record can't be used."""
        try:
            prepared = self._plan.preparation.prepare(unit)
        except PromptError as error:
            self._failure = PromptError(
                f"{error} What was finished is kept. The same command goes on once the record is mended; with "
                "--skip-bad, such records are left out and counted."
            )
            return None
        self._plan.report.count(prepared)
        for _ in range(len(unit.rows) - len(prepared.conversations)):
            self._on_sequence(0, "")
        return prepared

    def _advance(self, completion: Completion, engine: Engine, sink: Sink) -> None:
        unit_id, conversation = self._running.pop(completion.key)
        record = conversation.record
        if completion.finish_reason == ABORTED:  # the unit stays unfinished, so that the record is tried again
            self._num_aborted += 1
            return
        if completion.fault:
            sink.put(Outcome(unit_id, record, reason=completion.fault, is_fault=True))
            return
        try:
            outcome = conversation.advance(completion)
        except PromptError as error:
            # Whether a later turn is too long depends on the target's answers, so this is no fault of the record.
            is_too_long = isinstance(error, SequenceTooLong)
            if self._config.skip_bad or is_too_long:
                reason = f"{'too long' if is_too_long else 'unusable'} after some turns"
                sink.put(Outcome(unit_id, record, reason=reason))
            else:
                self._failure = PromptError(f"{record.source}, row {record.row}: {error}")
            return
        if isinstance(outcome, EngineRequest):
            self._running[outcome.key] = unit_id, conversation
            engine.submit(outcome)
        else:
            sink.put(Outcome(unit_id, record, outcome))
