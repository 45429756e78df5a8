"""Decoding with two drafters and the real target, which checks that replay is right."""

# T tokens with a state, D context features, N anchors (one here), B branches or candidates, J = G - 1 drafted positions
from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from ...data.cache.arrays import NUM_ALTERNATIVES
from ...data.cache.cache import Cache
from ...data.cache.index import SequenceRow
from ...data.errors import CacheNotFoundError
from ..devices import choose_device, choose_dtype
from ..draft.passes import OpenBranches, complete_branches, draft_pass, rank_next
from ..drafter.blocks import NO_TOKEN
from ..drafter.checkpoint import check_drafter, load_drafter
from ..drafter.model import Drafter
from ..drafter.target_pieces import TargetPieces
from .branches import POLICIES, Branches, CycleFacts, show_branches, with_whole_draft
from .config import EvalConfig


@dataclass(frozen=True, slots=True)
class LiveReport:
    """What decoding the prompts of cached responses has given."""

    num_prompts: int
    num_identical: int
    """Responses equal to the cached ones, token by token."""
    num_tokens: int
    num_cycles: int

    @property
    def alpha(self) -> float:
        """Tokens committed per cycle, the bonus token included; a response's first token comes from the prefill."""
        return self.num_tokens / self.num_cycles


@dataclass
class LiveDecoder:
    """Decodes greedily, one prompt at a time."""

    target: PreTrainedModel
    pieces: TargetPieces
    first: Drafter
    second: Drafter
    layer_ids: tuple[int, ...]
    policy: str
    k: int

    @torch.inference_mode()
    def decode(self, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], int]:
        """The first `num_tokens` tokens of the response, and the drafting cycles that they took."""
        past = DynamicCache()
        choices, features_TD = self.step([prompt_ids], past)
        tokens = [*prompt_ids, int(choices[0, -1])]
        features_TD = features_TD[0]
        cycles = 0
        while len(tokens) - len(prompt_ids) < num_tokens:
            committed = self.verify(tokens[-1], self.candidates(tokens, features_TD), past)
            _, new_features = self.step([[tokens[-1], *committed[:-1]]], past)
            features_TD = torch.cat([features_TD, new_features[0]])
            tokens += committed
            cycles += 1
        return tokens[len(prompt_ids) : len(prompt_ids) + num_tokens], cycles

    def step(self, rows: list[list[int]], past: DynamicCache) -> tuple[Tensor, Tensor]:
        """The target's greedy choices [B, tokens] after new tokens, and the tokens' context features [B, tokens, D]."""
        token_ids = torch.tensor(rows, device=self.pieces.embed_VH.device)
        out: Any = self.target(token_ids, past_key_values=past, use_cache=True, output_hidden_states=True)
        # The cache stores states as bfloat16, so the drafters here see the same.
        features = torch.cat([out.hidden_states[i + 1] for i in self.layer_ids], dim=-1).bfloat16()
        return out.logits.argmax(dim=-1), features.to(self.pieces.embed_VH.dtype)

    def candidates(self, tokens: list[int], features_TD: Tensor) -> Tensor:
        """The first draft and the completed branches [B, J], padded with `NO_TOKEN`."""
        anchor_N = torch.tensor([len(tokens) - 1], device=features_TD.device)
        anchor_id_N = torch.tensor([tokens[-1]], device=features_TD.device)
        context = self.first.context(features_TD)
        tokens_NJA, probs_NJA = draft_pass(
            self.first, self.pieces, context, None, anchor_N, anchor_id_N, NUM_ALTERNATIVES
        )
        draft_NJ = tokens_NJA[..., 0]
        second_context = self.second.context(features_TD)

        def opened(branches: Branches) -> OpenBranches:
            num_branches = branches.prefix_len_NB.shape[1]
            return OpenBranches(
                anchor_N.expand(num_branches),
                anchor_id_N.expand(num_branches),
                show_branches(draft_NJ, branches)[0],
                branches.visible_len_NB[0],
                branches.excluded_NB[0],
            )

        def next_tokens(branches: Branches) -> tuple[Tensor, Tensor]:
            found = rank_next(self.second, self.pieces, second_context, None, opened(branches), NUM_ALTERNATIVES + 1)
            return found[0][None], found[1][None]

        branches = POLICIES[self.policy](CycleFacts(tokens_NJA, probs_NJA, self.k, next_tokens))
        if not branches.prefix_len_NB.shape[1]:
            return draft_NJ
        branches = with_whole_draft(branches, draft_NJ.shape[1], self.second.shape.block_size)
        completed_BJ = complete_branches(self.second, self.pieces, second_context, None, opened(branches))
        padding = completed_BJ.shape[1] - draft_NJ.shape[1]
        return torch.cat([torch.nn.functional.pad(draft_NJ, (0, padding), value=NO_TOKEN), completed_BJ])

    def verify(self, anchor_id: int, candidates_BJ: Tensor, past: DynamicCache) -> list[int]:
        """The accepted tokens of the best candidate, then the target's own next token; `past` does not change."""
        branched = copy.deepcopy(past)
        branched.batch_repeat_interleave(len(candidates_BJ))
        rows = [[anchor_id, *row] for row in candidates_BJ.clamp(min=0).tolist()]
        choices, _ = self.step(rows, branched)
        accepted_BJ = (choices[:, :-1] == candidates_BJ).long().cumprod(dim=1)
        best = int(accepted_BJ.sum(dim=1).argmax())
        return choices[best, : int(accepted_BJ[best].sum()) + 1].tolist()


def decode_prompts(
    cache: Cache,
    target: Any,
    drafters: tuple[Path, Path],
    rows: Sequence[SequenceRow],
    config: EvalConfig,
    on_prompt: Callable[[], None] = lambda: None,
) -> LiveReport:
    """Decodes the prompts of these sequences with the target.

    Args:
        target: the target's model in float32; it is moved to the device.
        drafters: the first and the second drafter.
        rows: sequences with a single response, see `single_responses`.

    Raises:
        DrafterError: a drafter does not fit the cache.
    """
    device = choose_device(config.device)
    dtype = choose_dtype("auto", device)
    for folder in drafters:
        check_drafter(folder, cache.manifest)
    first, second = (
        load_drafter(folder, target_folder=cache.target_folder, device=device, dtype=dtype) for folder in drafters
    )
    pieces = TargetPieces.load(cache.target_folder, device=device, dtype=dtype)
    decoder = LiveDecoder(
        target.to(device).eval(), pieces, first, second, cache.manifest.layer_ids, config.policies[0], config.k
    )
    num_identical = num_tokens = num_cycles = 0
    for row in rows:
        tokens = cache.read_tokens(row).token_ids_S.tolist()
        recorded = tokens[row.prompt_len :]
        response, cycles = decoder.decode(tokens[: row.prompt_len], len(recorded))
        num_identical += response == recorded
        num_tokens += len(recorded) - 1
        num_cycles += cycles
        on_prompt()
    return LiveReport(len(rows), num_identical, num_tokens, num_cycles)


def single_responses(cache: Cache, rows: Sequence[SequenceRow], limit: int) -> list[SequenceRow]:
    """The first sequences that consist of one prompt and one response of at least two tokens.

    Raises:
        CacheNotFoundError: there is none.
    """
    found = [row for row in rows if row.num_supervised == row.num_tokens + 1 - row.prompt_len > 1]
    if not found:
        raise CacheNotFoundError(
            f"expected a held-out sequence of {cache.place} with one prompt and one response to decode, found none "
            f"among {len(rows)}. Hold out more (--holdout)."
        )
    return found[:limit]
