"""Greedy decoding with two drafters and the real target, written plainly, to check replay."""

# D context features, G block size
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedModel
from vpd.data.cache.cache import Cache
from vpd.stages.drafter.checkpoint import load_drafter
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.target_pieces import TargetPieces
from vpd.stages.evaluate.config import EvalConfig
from vpd.stages.evaluate.replay import Replay
from vpd.stages.extract.target import load_target
from vpd.stages.train.checkpoints import find_drafter

from support.slow_decode import Ranked, SlowDrafter, slow_candidates, slow_continued
from support.slow_tree import slow_best_chain, slow_tables, slow_tree


@dataclass
class LiveDecoder:
    """Decodes one prompt at a time; counts cycles."""

    target: PreTrainedModel
    pieces: TargetPieces
    first: Drafter
    second: Drafter
    layer_ids: tuple[int, ...]
    eos_token_ids: set[int]
    config: EvalConfig

    @torch.inference_mode()
    def decode(self, prompt_ids: list[int], max_new_tokens: int, way: str) -> tuple[list[int], int]:
        """Returns the response and the number of drafting cycles it took."""
        past = DynamicCache()
        logits, features = self.step(prompt_ids, past)
        tokens = [*prompt_ids, int(logits[-1].argmax())]
        start, cycles = len(prompt_ids), 0
        while not self.over(tokens[start:], max_new_tokens):
            candidates = self.candidates(tokens[-1], features, len(tokens) - 1, way)
            committed, new_features = self.verify(tokens[-1], candidates, past)
            features = torch.cat([features, new_features])
            tokens += committed
            cycles += 1
        response = tokens[start:]
        ends = [i + 1 for i, token in enumerate(response) if token in self.eos_token_ids]
        return response[: min([*ends, max_new_tokens])], cycles

    def over(self, response: list[int], max_new_tokens: int) -> bool:
        return len(response) >= max_new_tokens or any(token in self.eos_token_ids for token in response)

    def step(self, token_ids: list[int], past: DynamicCache) -> tuple[Tensor, Tensor]:
        """Adds these tokens to the cache; returns their logits and the drafters' features."""
        out = self.target(torch.tensor([token_ids]), past_key_values=past, use_cache=True, output_hidden_states=True)
        # The cache stores states as bfloat16, so this decoder rounds them too.
        states = torch.cat([out.hidden_states[i + 1][0] for i in self.layer_ids], dim=-1)
        return out.logits[0], states.bfloat16().float()

    def verify(self, anchor: int, candidates: list[list[int]], past: DynamicCache) -> tuple[list[int], Tensor]:
        """The tokens committed by the best candidate, and the features of the anchor and the accepted tokens."""
        copies = copy.deepcopy(past)
        copies.batch_repeat_interleave(len(candidates))
        longest = max(map(len, candidates))
        rows = [[anchor, *candidate, *[anchor] * (longest - len(candidate))] for candidate in candidates]
        choices = self.target(torch.tensor(rows), past_key_values=copies, use_cache=True).logits.argmax(dim=-1).tolist()
        best: list[int] = []
        for candidate, chosen in zip(candidates, choices, strict=True):
            accepted = 0
            while accepted < len(candidate) and candidate[accepted] == chosen[accepted]:
                accepted += 1
            if accepted + 1 > len(best):
                best = [*candidate[:accepted], chosen[accepted]]
        return best, self.step([anchor, *best[:-1]], past)[1]

    def candidates(self, anchor: int, features: Tensor, position: int, way: str) -> list[list[int]]:
        ranked = self.ranked(self.first, features, position, (anchor,))
        draft = [best[0][1] for best in ranked]
        if way == "first":
            return [draft]
        if way == "first_tree":
            return leaves(slow_tree(slow_tables(ranked, None, "", 0, position, anchor), self.config.nodes))
        drafter = self.second if way == "d2sd" else self.first
        second = Second(drafter.shape.block_size, lambda _, visible: self.ranked(drafter, features, position, visible))
        policy, k = self.config.policies[0], self.config.k
        if self.config.way == "branches":
            continued = slow_continued(draft, second, position, anchor) if k else []
            return [*slow_candidates(ranked, second, policy, position, anchor)[: k + 1], *continued]
        tables = slow_tables(ranked, second, policy, k, position, anchor)
        if self.config.way == "best chain":
            return leaves(slow_best_chain(tables))
        return leaves(slow_tree(tables, self.config.nodes))

    def ranked(self, drafter: Drafter, features: Tensor, position: int, visible: tuple[int, ...]) -> Ranked:
        """The eight likeliest tokens after the visible ones, with probabilities; the context ends before the anchor."""
        assert len(features) == position
        shape = drafter.shape
        block = [*visible, *[shape.mask_token_id] * (shape.block_size - len(visible))]
        embedded = self.pieces.embed_VH[torch.tensor([block])]
        hidden = drafter(embedded, torch.tensor([position]), drafter.context(features))[0]
        best = (hidden[len(visible) :] @ self.pieces.head_VH.T).softmax(dim=-1).topk(8, dim=-1)
        return [list(zip(*row, strict=True)) for row in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


class Second(SlowDrafter):
    """A second drafter at one anchor."""

    def __init__(self, block_size: int, ranked: Callable[[int, tuple[int, ...]], Ranked]):
        self.block_size = block_size
        self.ranked = cache(ranked)


def leaves(paths: list[tuple[int, ...]]) -> list[list[int]]:
    """The paths of a tree that no other path continues."""
    inner = {path[:-1] for path in paths}
    return [list(path) for path in paths if path not in inner]


WAYS = ("first", "first_tree", "first_as_second", "d2sd")


def check_replay_equals_decoding(
    run: dict[str, Path],
    way: str = "two-drafter tree",
    *,
    policy: str,
    num_sequences: int,
    max_new_tokens: int,
) -> dict[str, float]:
    """
    Args:
        run: the target's folder, the cache's, the first drafter's run, and the VP-Drafter's.
    """
    target_folder, cache_folder, first, vp = (run[name] for name in ("target_folder", "cache_folder", "first", "vp"))
    cache = Cache.open(cache_folder)
    # Only sequences with a single response can be decoded from their prompt.
    single = [row for row in cache.rows if row.num_supervised == row.num_tokens + 1 - row.prompt_len]
    rows = single[:num_sequences]
    config = EvalConfig.model_validate({"k": 3, "max_k": 3, "policies": [policy], "way": way})
    report = Replay(cache, find_drafter(first), find_drafter(vp), config).run(rows)
    target = load_target(str(target_folder))
    decoder = LiveDecoder(
        target=AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval(),
        pieces=TargetPieces.load(cache.target_folder),
        first=load_drafter(find_drafter(first)),
        second=load_drafter(find_drafter(vp)),
        layer_ids=cache.manifest.layer_ids,
        eos_token_ids=target.eos_token_ids,
        config=config,
    )
    # Ways without a second draft do not depend on the settings of the others.
    decoded = WAYS if (policy, way) == ("reranked", "two-drafter tree") else WAYS[2:]
    cycles = dict.fromkeys(decoded, 0)
    for row in rows:
        tokens = cache.read(row).token_ids_S.tolist()
        for way in decoded:
            response, count = decoder.decode(tokens[: row.prompt_len], max_new_tokens, way)
            assert response == tokens[row.prompt_len :], "decoding with drafts must give the target's greedy tokens"
            cycles[way] += count
    assert {way: report.num_cycles[way] for way in decoded} == cycles
    return report.alpha
