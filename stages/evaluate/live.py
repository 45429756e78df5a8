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
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ...data.cache.cache import Cache
from ...data.cache.index import SequenceRow
from ...data.errors import CacheNotFoundError
from ..devices import choose_device, choose_dtype
from ..draft.conditionals import marginals
from ..draft.passes import OpenBranches, draft_pass, redraft
from ..draft.tree import ABSENT, ROOT, Conditionals, best_chain, grow
from ..drafter.blocks import NO_TOKEN
from ..drafter.checkpoint import check_drafter, load_drafter
from ..drafter.model import Drafter
from ..drafter.target_pieces import TargetPieces
from ..extract.layer_outputs import LayerOutputs
from ..extract.transformers_engine import kept_past
from .branches import POLICIES, CycleFacts, Shown
from .config import EvalConfig
from .second_drafts import TREE_ALTERNATIVES, draft_second
from .ways import BEST_CHAIN, BRANCHES, TWO_DRAFTER_TREE

KEY_VALUE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer)


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
    outputs: LayerOutputs
    """The target's context layers."""
    config: EvalConfig

    @torch.inference_mode()
    def decode(self, prompt_ids: list[int], num_tokens: int) -> tuple[list[int], int]:
        """The first `num_tokens` tokens of the response, and the drafting cycles that they took."""
        choices, features_TD, past = self.step([prompt_ids], 0, None)
        tokens = [*prompt_ids, int(choices[0, -1])]
        features_TD = features_TD[0]
        cycles = 0
        while len(tokens) - len(prompt_ids) < num_tokens:
            committed = self.verify(tokens, self.candidates(tokens, features_TD), past)
            _, new_features, past = self.step([[tokens[-1], *committed[:-1]]], len(tokens) - 1, past)
            features_TD = torch.cat([features_TD, new_features[0]])
            tokens += committed
            cycles += 1
        return tokens[len(prompt_ids) : len(prompt_ids) + num_tokens], cycles

    def step(self, rows: list[list[int]], start: int, past: Any) -> tuple[Tensor, Tensor, Any]:
        """The target's greedy choices [B, tokens] after new tokens, the tokens' context features [B, tokens, D], and
        what the target keeps of all tokens so far.

        Args:
            start: position of the first new token.
            past: what the target has kept of the tokens before; it may change. None: there are none.
        """
        steps = [rows]
        if past is not None and not is_key_value_cache(past):
            steps = [[[row[i]] for row in rows] for i in range(len(rows[0]))]
        choices, features = [], []
        for step in steps:
            token_ids = torch.tensor(step, device=self.pieces.embed_VH.device)
            end = start + token_ids.shape[1]
            positions = torch.arange(start, end, device=token_ids.device).expand_as(token_ids)
            mask = torch.ones(len(token_ids), end, dtype=torch.int64, device=token_ids.device)
            out: Any = self.target(
                token_ids, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
            )
            start = end
            past = kept_past(out, self.target)
            choices.append(out.logits.argmax(dim=-1))
            # The cache stores states as bfloat16, so the drafters here see the same.
            features.append(torch.cat(self.outputs.latest(), dim=-1).bfloat16())
        return torch.cat(choices, dim=1), torch.cat(features, dim=1).to(self.pieces.embed_VH.dtype), past

    def candidates(self, tokens: list[int], features_TD: Tensor) -> Tensor:
        """The paths [B, J] that the target verifies, padded with `NO_TOKEN`."""
        anchor_N = torch.tensor([len(tokens) - 1], device=features_TD.device)
        anchor_id_N = torch.tensor([tokens[-1]], device=features_TD.device)
        context = self.first.context(features_TD)
        tokens_NJA, probs_NJA = draft_pass(
            self.first, self.pieces, context, None, anchor_N, anchor_id_N, TREE_ALTERNATIVES
        )
        draft_NJ = tokens_NJA[..., 0]
        if not self.config.k:
            return draft_NJ if self.config.way != TWO_DRAFTER_TREE else self.leaves(marginals(tokens_NJA, probs_NJA))
        second_context = self.second.context(features_TD)

        def fill(shown: Shown) -> tuple[Tensor, Tensor]:
            (num_blocks,) = shown.visible_len_NB[0].shape
            anchors = anchor_N.expand(num_blocks), anchor_id_N.expand(num_blocks)
            opened = OpenBranches(*anchors, *(each[0] for each in shown))
            tokens, probs = redraft(self.second, self.pieces, second_context, None, opened, TREE_ALTERNATIVES)
            return tokens[None], probs[None]

        drafts = draft_second(
            CycleFacts(tokens_NJA, probs_NJA, self.config.k),
            POLICIES[self.config.policies[0]],
            self.second.shape.block_size,
            fill,
        )
        if self.config.way == BRANCHES:
            return drafts.candidates()[0]
        conditionals = drafts.conditionals(self.config.k)
        return best_chain(conditionals) if self.config.way == BEST_CHAIN else self.leaves(conditionals)

    def leaves(self, conditionals: Conditionals) -> Tensor:
        """The paths [B, J] that end at a leaf of the tree, padded with `NO_TOKEN`."""
        tree = grow(conditionals, self.config.nodes)
        tokens, parents, depths = (x[0].tolist() for x in (tree.tokens_NM, tree.parents_NM, tree.depths_NM))
        paths = []
        for node, parent in enumerate(parents):
            if parent == ABSENT or node in parents:
                continue
            path = torch.full((conditionals.num_positions,), NO_TOKEN)
            while node != ROOT:
                path[depths[node] - 1] = tokens[node]
                node = parents[node]
            paths.append(path)
        return torch.stack(paths).to(tree.tokens_NM.device)

    def verify(self, tokens: list[int], candidates_BJ: Tensor, past: Any) -> list[int]:
        """The accepted tokens of the best candidate, then the target's own next token; `past` does not change."""
        rows = [[tokens[-1], *row] for row in candidates_BJ.clamp(min=0).tolist()]
        start = len(tokens) - 1
        if is_key_value_cache(past):
            branched = copy.deepcopy(past)
            branched.batch_repeat_interleave(len(rows))
            choices = self.step(rows, start, branched)[0]
        else:
            choices = torch.cat([self.step([row], start, copy.deepcopy(past))[0] for row in rows])
        accepted_BJ = (choices[:, :-1] == candidates_BJ).long().cumprod(dim=1)
        best = int(accepted_BJ.sum(dim=1).argmax())
        return choices[best, : int(accepted_BJ[best].sum()) + 1].tolist()


def is_key_value_cache(past: Any) -> bool:
    """Whether a target keeps keys and values alone, whose rows can be repeated and which takes several tokens at once.

    Layers with a recurrent state keep it otherwise, and for some of them transformers drops the state where several
    tokens follow.
    """
    return isinstance(past, DynamicCache) and all(type(each) in KEY_VALUE_LAYERS for each in past.layers)


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
    outputs = LayerOutputs(target, cache.manifest.num_target_layers, cache.manifest.layer_ids)
    decoder = LiveDecoder(target.to(device).eval(), pieces, first, second, outputs, config)
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
