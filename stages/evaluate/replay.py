"""Acceptance length by replay: decoding with two drafters over cached greedy responses, without the target.

On a greedy response the target would accept exactly the recorded continuation, and the cache holds the states of
every token. So the drafters alone decide the outcome of a cycle. Replay computes the outcome at every anchor at once,
and finds afterwards which anchors a way of decoding visits.
"""

# S tokens of a sequence, T with a state, D context features
# N anchors, G block size, J = G - 1 drafted positions, A alternatives, B branches per anchor, R branches of any anchors
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.errors import CacheNotFoundError, DrafterError
from ..config import ReadConfig
from ..devices import choose_device, choose_dtype
from ..draft.passes import cut_into_passes, draft_all, redraft
from ..drafter.checkpoint import check_drafter, load_drafter
from ..drafter.model import Context, Drafter
from ..drafter.target_pieces import TargetPieces
from ..trained_on import read_record, was_trained_on
from .batch import Batch, join, open_branches
from .branches import POLICIES, Branches, CycleFacts, Shown, paper, runner_up
from .config import EvalConfig
from .nodes import leading_right
from .outcomes import Outcomes
from .pair import check_pair
from .report import FirstDraftOutcomes, ReplayReport
from .responses import find_responses, recorded_after, replayable_responses
from .second_drafts import TREE_ALTERNATIVES, draft_second
from .slices import Response
from .ways import D2SD, FIRST_AS_SECOND, all_ways, reported_ways

TOKENS_PER_BATCH = 4096
"""Context tokens of the sequences that are replayed together."""
BLOCKS_PER_PASS = 512
"""Blocks of one forward pass of a drafter."""


def require_replayable(cache: Cache, rows: Sequence[SequenceRow]) -> None:
    """Checks without a drafter that there is something to replay.

    Raises:
        CacheNotFoundError: no sequence can be replayed.
    """
    skipped: Counter[str] = Counter()
    for row in rows:
        usable, reason = replayable_responses(cache.read_tokens(row))
        if usable:
            return
        skipped[reason] += 1
    raise nothing_to_replay(cache, len(rows), skipped)


def require_all_anchors(drafts: FirstDrafts) -> None:
    """
    Raises:
        DrafterError: the first drafts leave out anchors.
    """
    if drafts.facts["stride"] != 1:
        raise DrafterError(
            f"the first drafts {drafts.fingerprint} leave out anchors (stride {drafts.facts['stride']}), and replay "
            f"needs them all. Remove {drafts.place}, and make them again: vpd draft --stride 1."
        )


def nothing_to_replay(cache: Cache, num_rows: int, skipped: Counter[str]) -> CacheNotFoundError:
    if not num_rows:
        return CacheNotFoundError(
            f"expected held-out greedy responses in {cache.place}, found none: of its {len(cache.rows)} sequences, "
            "none is held out. Hold out more: train the drafters with a larger --holdout, or give vpd eval a larger "
            "--holdout, which counts the sequences that a drafter was trained on."
        )
    reasons = ", ".join(f"{reason}: {count}" for reason, count in skipped.items())
    return CacheNotFoundError(
        f"expected held-out greedy responses in {cache.place}, found none among {num_rows} held-out sequences "
        f"({reasons}). Hold out more (--holdout), or extract with --mode generate and temperature 0."
    )


class Replay:
    """Replays sequences with a first drafter or its recorded drafts, and with a second drafter if there is one."""

    def __init__(
        self,
        cache: Cache,
        first: Path | FirstDrafts,
        second: Path | None,
        config: EvalConfig,
        read: ReadConfig | None = None,
        brief: bool = False,
    ):
        """
        Args:
            brief: replays the ways of the headline alone, without the first drafter as second, each at one number of
                branches and nodes.

        Raises:
            DrafterError: a drafter does not fit the cache, recorded drafts leave out anchors, or the drafters are
                swapped.
        """
        warnings = check_pair(first, second) if isinstance(first, Path) else []
        self.cache, self.config, self.read = cache, config, read or ReadConfig()
        self.device = choose_device(config.device)
        self.dtype = choose_dtype("auto", self.device)
        self.pieces = TargetPieces.load(cache.target_folder, device=self.device, dtype=self.dtype)
        self.second = None if second is None else self._load(second)
        self.first: Drafter | None = None
        self.drafts: FirstDrafts | None = None
        if isinstance(first, FirstDrafts):
            require_all_anchors(first)
            self.drafts, block_size = first, first.block_size
        else:
            self.first = self._load(first)
            block_size = self.first.shape.block_size
        self.num_positions = max(block_size, 0 if self.second is None else self.second.shape.block_size) - 1
        seconds = {FIRST_AS_SECOND: None if brief else self.first, D2SD: self.second}
        self.seconds = {name: drafter for name, drafter in seconds.items() if drafter is not None}
        # Recorded first drafts do not say what their drafter was trained on.
        self.records = {"first": read_record(first) if isinstance(first, Path) else None}
        if second is not None:
            self.records["second"] = read_record(second)
        reported = reported_ways(config, list(self.seconds))
        self.ways = list(dict.fromkeys([*reported.values(), *(() if brief else all_ways(config, list(self.seconds)))]))
        self.num_branches = max(1, *(way.k for way in self.ways))
        self.report = ReplayReport(self.ways, reported, config, block_size, warnings=warnings)

    def _load(self, folder: Path) -> Drafter:
        check_drafter(folder, self.cache.manifest)
        return load_drafter(folder, target_folder=self.cache.target_folder, device=self.device, dtype=self.dtype)

    def run(self, rows: Sequence[SequenceRow], on_sequence: Callable[[], None] = lambda: None) -> ReplayReport:
        """Replays these sequences.

        Args:
            on_sequence: called after each sequence.

        Raises:
            CacheNotFoundError: no sequence can be replayed.
        """
        requests = map(Request, rows[: self.config.limit])
        with closing(read_ahead(self.cache.states, requests, self.read.num_threads)) as sequences:
            for batch in self.batches(sequences, on_sequence):
                self.replay(batch)
        if not self.report.num_responses:
            raise nothing_to_replay(self.cache, len(rows), self.report.skipped)
        return self.report

    def batches(self, sequences: Iterator[CachedSequence], on_sequence: Callable[[], None]) -> Iterator[Batch]:
        """Packs the replayable responses of sequences into batches of `TOKENS_PER_BATCH`."""
        waiting: list[Batch] = []
        for sequence in sequences:
            single = self.responses_of(sequence)
            if single is not None:
                waiting.append(single)
            if sum(len(batch.features_TD) for batch in waiting) >= TOKENS_PER_BATCH:
                yield join(waiting)
                waiting = []
            on_sequence()
        if waiting:
            yield join(waiting)

    def responses_of(self, sequence: CachedSequence) -> Batch | None:
        """A batch of one sequence; None if no response can be replayed, and the reason is counted."""
        usable, reason = replayable_responses(sequence)
        if not usable:
            self.report.skipped[reason] += 1
            return None
        self.report.seq_ids.append(sequence.row.seq_id)
        for drafter, records in self.records.items():
            self.report.trained_on.setdefault(drafter, []).append(was_trained_on(sequence.row, records))
        turns = {span: turn for turn, span in enumerate(find_responses(sequence.loss_mask_S), 1)}
        responses = [Response(start, end - start - 1, turns[start, end], sequence.row.source) for start, end in usable]
        anchors_N = torch.cat([torch.arange(start, end - 1) for start, end in usable])
        recorded_NJ = torch.cat([recorded_after(sequence.token_ids_S, span, self.num_positions) for span in usable])
        return Batch(
            # A copy, since the reader fills its buffer again with the next sequence.
            features_TD=sequence.hidden(self.device).flatten(1).to(self.dtype, copy=True),
            num_tokens=[sequence.row.num_tokens],
            num_anchors=[len(anchors_N)],
            responses=[responses],
            anchors_N=anchors_N.to(self.device),
            anchor_ids_N=sequence.token_ids_S[anchors_N].to(self.device),
            recorded_NJ=recorded_NJ.to(self.device),
            drafts=None if self.drafts is None else self.recorded_drafts(sequence.row, anchors_N),
        )

    def recorded_drafts(self, row: SequenceRow, anchors_N: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens and probabilities [N, J, A] at these anchors."""
        assert self.drafts is not None
        drafted = self.drafts.read(row)
        return drafted.tokens_TGA[anchors_N].long().to(self.device), drafted.probs_TGA[anchors_N].float().to(
            self.device
        )

    @torch.inference_mode()
    def replay(self, batch: Batch) -> None:
        """Adds a batch to the report."""
        contexts = {
            drafter: drafter.context(batch.features_TD, batch.num_tokens)
            for drafter in (self.first, self.second)
            if drafter is not None
        }
        tokens_NJA, probs_NJA = batch.drafts or self.draft(batch, contexts)
        facts = CycleFacts(tokens_NJA, probs_NJA, self.num_branches)
        outcomes = Outcomes(self.ways, batch.recorded_NJ)
        outcomes.add_first(tokens_NJA, probs_NJA, batch.anchors_N)
        for name, drafter in self.seconds.items():
            fill = partial(self.redraft, batch, drafter, contexts[drafter])
            for policy in sorted({way.policy for way in self.ways if way.policy is not None}):
                drafts = draft_second(facts, POLICIES[policy], drafter.shape.block_size, fill)
                outcomes.add_second(name, policy, drafts)
                outcomes.add_third(name, policy, drafts, fill)
        self.report.add(
            outcomes.accept_lens(), outcomes.costs(), batch.responses, self.first_draft_outcomes(batch, facts)
        )

    def first_draft_outcomes(self, batch: Batch, facts: CycleFacts) -> FirstDraftOutcomes:
        """How the first drafts turned out, and where branches would have rescued them."""
        draft_NJ = facts.tokens_NJA[..., 0]
        first_len_N = leading_right(draft_NJ, batch.recorded_NJ)
        return FirstDraftOutcomes(
            first_len_N=first_len_N.cpu().numpy(),
            confidence_NJ=facts.confidence_NJ.cpu().numpy(),
            num_recorded_N=(batch.recorded_NJ[:, : draft_NJ.shape[1]] >= 0).sum(dim=1).cpu().numpy(),
            boundary_rank_N=self.rank(paper(facts), batch, first_len_N).numpy(),
            pair_rank_N=self.rank(runner_up(facts), batch, first_len_N).numpy(),
        )

    def draft(self, batch: Batch, contexts: Mapping[Drafter, Context]) -> tuple[Tensor, Tensor]:
        """The first drafter's tokens and probabilities [N, J, A] at all anchors."""
        assert self.first is not None
        return draft_all(
            self.first,
            self.pieces,
            contexts[self.first],
            batch.sequence_N,
            batch.anchors_N,
            batch.anchor_ids_N,
            BLOCKS_PER_PASS,
            TREE_ALTERNATIVES,
        )

    def redraft(self, batch: Batch, drafter: Drafter, context: Context, shown: Shown) -> tuple[Tensor, Tensor]:
        """A drafter's likeliest tokens [N, B, J, A] after the visible ones, and their probabilities."""
        N, B = shown.visible_len_NB.shape
        rows_R = torch.arange(N, device=self.device).repeat_interleave(B)
        columns_R = torch.arange(B, device=self.device).repeat(N)
        found = []
        for chunk, num_blocks in cut_into_passes(batch.sequence_N[rows_R], len(batch.num_tokens), BLOCKS_PER_PASS):
            chosen = open_branches(batch, shown, rows_R[chunk], columns_R[chunk])
            found.append(redraft(drafter, self.pieces, context, num_blocks, chosen, TREE_ALTERNATIVES))
        tokens, probs = (torch.cat(parts) for parts in zip(*found, strict=True))
        return tokens.view(N, B, *tokens.shape[1:]), probs.view(N, B, *probs.shape[1:])

    def rank(self, branches: Branches, batch: Batch, first_len_N: Tensor) -> Tensor:
        """0-based rank of the branch with the first draft's true boundary and the right token there; -1: no branch has.

        A branch without an alternative needs the right boundary alone.
        """
        at_boundary_NB = branches.prefix_len_NB == first_len_N[:, None]
        boundary_N1 = first_len_N[:, None].clamp(max=self.num_positions - 1)
        needed_NB = batch.recorded_NJ.gather(1, boundary_N1).expand_as(at_boundary_NB)
        free_NB = branches.alternative_NB < 0
        right_NB = at_boundary_NB & (free_NB | (branches.alternative_NB == needed_NB)) & (needed_NB >= 0)
        place_N = right_NB.long().argmax(dim=1) if right_NB.shape[1] else torch.zeros_like(first_len_N)
        return torch.where(right_NB.any(dim=1), place_N, -1).cpu()
