"""Acceptance length by replay: decoding with two drafters over cached greedy responses, without the target.

On a greedy response the target would accept exactly the recorded continuation, and the cache holds the states of
every token. So the drafters alone decide the outcome of a cycle. Replay computes the outcome at every anchor at once,
and finds afterwards which anchors a way of decoding visits. A branch whose visible tokens are wrong can't commit more
than the first draft, so replay does not complete the branch.
"""

# S tokens of a sequence, T with a state, D context features
# N anchors, G block size, J = G - 1 drafted positions, A alternatives, B branches per anchor, R branches of any anchors
# C ways of decoding
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ...data.cache.arrays import NUM_ALTERNATIVES
from ...data.cache.cache import Cache
from ...data.cache.drafts import FirstDrafts
from ...data.cache.index import SequenceRow
from ...data.cache.reader import CachedSequence, Request, read_ahead
from ...data.errors import CacheNotFoundError, DrafterError
from ..config import ReadConfig
from ..devices import choose_device, choose_dtype
from ..draft.passes import OpenBranches, complete_branches, cut_into_passes, draft_all, rank_next
from ..drafter.checkpoint import check_drafter, load_drafter
from ..drafter.model import Context, Drafter
from ..drafter.target_pieces import TargetPieces
from ..trained_on import read_record, was_trained_on
from .branches import POLICIES, Branches, CycleFacts, paper, runner_up, show_branches, with_whole_draft
from .config import EvalConfig
from .pair import check_pair
from .report import FirstDraftOutcomes, ReplayReport, Way
from .resampled import resampled_drafts
from .responses import recorded_after, replayable_responses

TOKENS_PER_BATCH = 4096
"""Context tokens of the sequences that are replayed together."""
BLOCKS_PER_PASS = 512
"""Blocks of one forward pass of a drafter."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The responses of several sequences, packed; anchors are all tokens of a response but the last."""

    features_TD: Tensor
    num_tokens: list[int]
    num_anchors: list[int]
    """Anchors of each sequence."""
    response_lens: list[list[int]]
    """Anchors of each response of each sequence."""
    anchors_N: Tensor
    """Positions of the anchors in their sequences."""
    anchor_ids_N: Tensor
    recorded_NJ: Tensor
    """Recorded tokens after each anchor, negative past the response."""
    drafts: tuple[Tensor, Tensor] | None
    """Recorded first drafts: tokens and probabilities [N, J, A]. None: the first drafter makes them."""

    @property
    def sequence_N(self) -> Tensor:
        """The number of each anchor's sequence."""
        counts = torch.tensor(self.num_anchors, device=self.anchors_N.device)
        return torch.arange(len(counts), device=counts.device).repeat_interleave(counts)


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
    ):
        """
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
        self.num_branches = max(config.k, config.max_k)
        seconds = {"first_as_second": self.first, "d2sd": self.second}
        self.seconds = {name: drafter for name, drafter in seconds.items() if drafter is not None}
        # Recorded first drafts do not say what their drafter was trained on.
        self.records = {"first": read_record(first) if isinstance(first, Path) else None}
        if second is not None:
            self.records["second"] = read_record(second)
        self.report = ReplayReport(list(self.ways()), config.policies[0], config.k, block_size, warnings=warnings)

    def _load(self, folder: Path) -> Drafter:
        check_drafter(folder, self.cache.manifest)
        return load_drafter(folder, target_folder=self.cache.target_folder, device=self.device, dtype=self.dtype)

    def ways(self) -> Iterator[Way]:
        """Every way of decoding that is replayed, in the order of `accept_lengths`."""
        numbers = range(self.num_branches + 1)
        yield Way("first", None, 0)
        yield from (Way("first_resampled", None, k) for k in numbers)
        yield from (Way("first_tree", None, k) for k in numbers)
        for name in self.seconds:
            yield from (Way(name, policy, k) for policy in self.config.policies for k in numbers)

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
        anchors_N = torch.cat([torch.arange(start, end - 1) for start, end in usable])
        recorded_NJ = torch.cat([recorded_after(sequence.token_ids_S, span, self.num_positions) for span in usable])
        return Batch(
            # A copy, since the reader fills its buffer again with the next sequence.
            features_TD=sequence.hidden(self.device).flatten(1).to(self.dtype, copy=True),
            num_tokens=[sequence.row.num_tokens],
            num_anchors=[len(anchors_N)],
            response_lens=[[end - start - 1 for start, end in usable]],
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
            name: drafter.context(batch.features_TD, batch.num_tokens) for name, drafter in self.seconds.items()
        }
        tokens_NJA, probs_NJA = batch.drafts or self.draft(batch, contexts["first_as_second"])
        draft_NJ = tokens_NJA[..., 0]
        first_len_N = leading_right(draft_NJ, batch.recorded_NJ)
        facts = CycleFacts(tokens_NJA, probs_NJA, self.num_branches)
        pairs = runner_up(facts)
        swapped_NB = leading_right(show_branches(draft_NJ, pairs), batch.recorded_NJ[:, None])
        drawn_NBJ = resampled_drafts(tokens_NJA, probs_NJA, batch.anchors_N, self.num_branches)
        drawn_NB = leading_right(drawn_NBJ, batch.recorded_NJ[:, None])
        columns = [first_len_N[:, None], self.best_of(first_len_N, drawn_NB), self.best_of(first_len_N, swapped_NB)]
        for name, drafter in self.seconds.items():
            next_tokens = partial(self.next_tokens, batch, draft_NJ, drafter, contexts[name])
            for policy in self.config.policies:
                branches = POLICIES[policy](facts._replace(next_tokens=next_tokens))
                lens_NB = self.complete(batch, draft_NJ, branches, drafter, contexts[name])
                columns.append(self.best_of(first_len_N, lens_NB))
        accept_lens_NC = torch.cat(columns, dim=1)
        outcomes = FirstDraftOutcomes(
            first_len_N=first_len_N.cpu().numpy(),
            confidence_NJ=facts.confidence_NJ.cpu().numpy(),
            num_recorded_N=(batch.recorded_NJ[:, : draft_NJ.shape[1]] >= 0).sum(dim=1).cpu().numpy(),
            boundary_rank_N=self.rank(paper(facts), batch, first_len_N).numpy(),
            pair_rank_N=self.rank(pairs, batch, first_len_N).numpy(),
        )
        self.report.add(accept_lens_NC.cpu().numpy(), batch.response_lens, outcomes)

    def draft(self, batch: Batch, context: Context) -> tuple[Tensor, Tensor]:
        """The first drafter's tokens and probabilities [N, J, A] at all anchors."""
        assert self.first is not None
        return draft_all(
            self.first,
            self.pieces,
            context,
            batch.sequence_N,
            batch.anchors_N,
            batch.anchor_ids_N,
            BLOCKS_PER_PASS,
        )

    def complete(
        self, batch: Batch, draft_NJ: Tensor, branches: Branches, drafter: Drafter, context: Context
    ) -> Tensor:
        """Accept lengths [N, B] of the completed branches; 0 if a branch can't commit more than the first draft.

        The whole first draft that a second drafter with a larger block continues counts with every branch, since it is
        verified beside any number of them.
        """
        num_branches = branches.prefix_len_NB.shape[1]
        branches = with_whole_draft(branches, draft_NJ.shape[1], drafter.shape.block_size)
        shown_NBJ = show_branches(draft_NJ, branches)
        visible_len_NB = branches.visible_len_NB
        right_len_NB = leading_right(shown_NBJ, batch.recorded_NJ[:, None])
        following_NB1 = visible_len_NB[..., None].clamp(max=self.num_positions - 1)
        following_NB = batch.recorded_NJ[:, None].expand(*shown_NBJ.shape[:2], -1).gather(2, following_NB1)[..., 0]
        promising_NB = (right_len_NB >= visible_len_NB) & (following_NB != branches.excluded_NB)
        rows_R, columns_R = promising_NB.nonzero(as_tuple=True)
        lens_NB = torch.zeros_like(right_len_NB)
        for chunk, num_blocks in cut_into_passes(batch.sequence_N[rows_R], len(batch.num_tokens), BLOCKS_PER_PASS):
            n, b = rows_R[chunk], columns_R[chunk]
            chosen = open_branches(batch, shown_NBJ, branches, n, b)
            candidates_RJ = complete_branches(drafter, self.pieces, context, num_blocks, chosen)
            lens_NB[n, b] = leading_right(candidates_RJ, batch.recorded_NJ[n])
        continued_N1 = lens_NB[:, num_branches:].sum(dim=1, keepdim=True)  # Zeros if there is no such column.
        return lens_NB[:, :num_branches].maximum(continued_N1)

    def next_tokens(
        self, batch: Batch, draft_NJ: Tensor, drafter: Drafter, context: Context, branches: Branches
    ) -> tuple[Tensor, Tensor]:
        """A drafter's likeliest tokens [N, B, A] after each branch's visible tokens, and their probabilities."""
        N, B = branches.prefix_len_NB.shape
        shown_NBJ = show_branches(draft_NJ, branches)
        rows_R = torch.arange(N, device=self.device).repeat_interleave(B)
        columns_R = torch.arange(B, device=self.device).repeat(N)
        found = []
        for chunk, num_blocks in cut_into_passes(batch.sequence_N[rows_R], len(batch.num_tokens), BLOCKS_PER_PASS):
            chosen = open_branches(batch, shown_NBJ, branches, rows_R[chunk], columns_R[chunk])
            found.append(rank_next(drafter, self.pieces, context, num_blocks, chosen, NUM_ALTERNATIVES + 1))
        tokens_RA, probs_RA = (torch.cat(parts) for parts in zip(*found, strict=True))
        return tokens_RA.view(N, B, -1), probs_RA.view(N, B, -1)

    def best_of(self, first_len_N: Tensor, lens_NB: Tensor) -> Tensor:
        """Longest accept length among the first draft and the first 0, 1, ... branches: [N, max branches + 1].

        A policy that offers fewer branches launches all that it offers.
        """
        best = torch.cat([first_len_N[:, None], lens_NB], dim=1).cummax(dim=1).values
        return best[:, torch.arange(self.num_branches + 1, device=best.device).clamp(max=best.shape[1] - 1)]

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


def open_branches(batch: Batch, shown_NBJ: Tensor, branches: Branches, n: Tensor, b: Tensor) -> OpenBranches:
    """The branches with indices `n` (anchor) and `b` (place), both int64 [R]."""
    return OpenBranches(
        batch.anchors_N[n],
        batch.anchor_ids_N[n],
        shown_NBJ[n, b],
        branches.visible_len_NB[n, b],
        branches.excluded_NB[n, b],
    )


def leading_right(candidates: Tensor, recorded: Tensor) -> Tensor:
    """Accept length of candidates [..., J]: number of leading tokens that equal the recorded ones.

    Training counts accepted tokens by code of its own (`drafter.blocks.accept_lengths`): replay checks training, so the
    two share no code for acceptance.
    """
    return (candidates == recorded[..., : candidates.shape[-1]]).long().cumprod(dim=-1).sum(dim=-1)


def join(batches: Sequence[Batch]) -> Batch:
    """Packs batches one after another."""
    drafts = [batch.drafts for batch in batches if batch.drafts is not None]
    return Batch(
        features_TD=torch.cat([batch.features_TD for batch in batches]),
        num_tokens=list(chain.from_iterable(batch.num_tokens for batch in batches)),
        num_anchors=list(chain.from_iterable(batch.num_anchors for batch in batches)),
        response_lens=list(chain.from_iterable(batch.response_lens for batch in batches)),
        anchors_N=torch.cat([batch.anchors_N for batch in batches]),
        anchor_ids_N=torch.cat([batch.anchor_ids_N for batch in batches]),
        recorded_NJ=torch.cat([batch.recorded_NJ for batch in batches]),
        drafts=(torch.cat([draft[0] for draft in drafts]), torch.cat([draft[1] for draft in drafts]))
        if drafts
        else None,
    )
