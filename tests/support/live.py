"""Greedy decoding with two drafters and the real target, written plainly, to check replay."""

# D context features, G block size
from __future__ import annotations

import copy
import math
from dataclasses import dataclass
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


@dataclass
class LiveDecoder:
    """Decodes one prompt at a time; counts cycles."""

    target: PreTrainedModel
    pieces: TargetPieces
    first: Drafter
    second: Drafter
    layer_ids: tuple[int, ...]
    eos_token_ids: set[int]
    policy: str
    """`paper`, `exclude` or `runner-up`."""
    k: int

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
        top = self.fill(self.first, [anchor], features, position)
        draft = [int(tokens[0]) for tokens, _ in top]
        if way == "first":
            return [draft]
        if way == "first_tree":
            return [draft, *([*kept, *draft[len(kept) :]] for kept, _ in self.branches("runner-up", top))]
        second = self.second if way == "d2sd" else self.first
        candidates = [draft]
        if self.policy == "reranked":
            chosen = self.reranked(second, anchor, top, features, position)
        else:
            chosen = self.branches(self.policy, top)
        for kept, excluded in chosen:
            filled = self.fill(second, [anchor, *kept], features, position)[len(kept) :]
            new = [int(tokens[0]) for tokens, _ in filled]
            if new and new[0] == excluded:
                new[0] = int(filled[0][0][1])
            candidates.append([*kept, *new])
        if self.k and second.shape.block_size > len(draft) + 1:
            filled = self.fill(second, [anchor, *draft], features, position)[len(draft) :]
            candidates.append([*draft, *(int(tokens[0]) for tokens, _ in filled)])
        return candidates

    def branches(self, policy: str, top: list[tuple[Tensor, Tensor]]) -> list[tuple[list[int], int | None]]:
        """The visible tokens of each branch, and the token that must not come next."""
        draft = [int(tokens[0]) for tokens, _ in top]
        confidence = [float(probs[0]) for _, probs in top]
        positions = range(len(draft))
        if policy == "runner-up":
            scored = [
                (math.prod(confidence[:i]) * float(top[i][1][j]), [*draft[:i], int(top[i][0][j])], None)
                for i in positions
                for j in range(1, 5)
            ]
        else:
            scored = [
                (math.prod(confidence[:i]) * (1 - confidence[i]), draft[:i], draft[i] if policy == "exclude" else None)
                for i in positions
            ]
        best = sorted(scored, key=lambda branch: branch[0], reverse=True)[: self.k]
        return [(kept, excluded) for _, kept, excluded in best]

    def reranked(
        self, second: Drafter, anchor: int, top: list[tuple[Tensor, Tensor]], features: Tensor, position: int
    ) -> list[tuple[list[int], None]]:
        """The best pairs of a length and the second drafter's token there, at the 4 likeliest lengths."""
        draft = [int(tokens[0]) for tokens, _ in top]
        confidence = [float(probs[0]) for _, probs in top]
        posterior = [math.prod(confidence[:i]) * (1 - confidence[i]) for i in range(len(draft))]
        scored = []
        for i in sorted(range(len(draft)), key=lambda i: -posterior[i])[:4]:
            known = dict(zip(top[i][0].tolist()[:5], top[i][1].tolist(), strict=False))
            for tokens, probs in self.fill(second, [anchor, *draft[:i]], features, position)[i : i + 1]:
                for token, prob in zip(tokens.tolist(), probs.tolist(), strict=True):
                    if token != draft[i]:
                        score = math.prod(confidence[:i]) * (known.get(token, 0.0) + prob) / 2
                        scored.append((score, [*draft[:i], token]))
        best = sorted(scored, key=lambda pair: pair[0], reverse=True)[: self.k]
        return [(kept, None) for _, kept in best]

    def fill(
        self, drafter: Drafter, visible: list[int], features: Tensor, position: int
    ) -> list[tuple[Tensor, Tensor]]:
        """The six likeliest tokens and their probabilities at positions 1..G-1; the context ends before the anchor."""
        assert len(features) == position
        shape = drafter.shape
        if len(visible) >= shape.block_size:
            return []
        block = visible + [shape.mask_token_id] * (shape.block_size - len(visible))
        embedded = self.pieces.embed_VH[torch.tensor([block])]
        hidden = drafter(embedded, torch.tensor([position]), drafter.context(features))[0]
        probs = (hidden[1:] @ self.pieces.head_VH.T).softmax(dim=-1)
        best = probs.topk(6, dim=-1)
        return list(zip(best.indices, best.values, strict=True))


WAYS = ("first", "first_tree", "first_as_second", "d2sd")


def check_replay_equals_decoding(
    target_folder: Path,
    cache_folder: Path,
    first: Path,
    vp: Path,
    *,
    policy: str,
    num_sequences: int,
    max_new_tokens: int,
) -> dict[str, float]:
    cache = Cache.open(cache_folder)
    # Only sequences with a single response can be decoded from their prompt.
    single = [row for row in cache.rows if row.num_supervised == row.num_tokens + 1 - row.prompt_len]
    rows = single[:num_sequences]
    config = EvalConfig(k=3, policies=[policy])
    report = Replay(cache, find_drafter(first), find_drafter(vp), config).run(rows)
    target = load_target(str(target_folder))
    decoder = LiveDecoder(
        target=AutoModelForCausalLM.from_pretrained(target_folder, dtype=torch.float32).eval(),
        pieces=TargetPieces.load(cache.target_folder),
        first=load_drafter(find_drafter(first)),
        second=load_drafter(find_drafter(vp)),
        layer_ids=cache.manifest.layer_ids,
        eos_token_ids=target.eos_token_ids,
        policy=policy,
        k=config.k,
    )
    # Ways without a second draft do not depend on the policy.
    decoded = WAYS if policy == "paper" else WAYS[2:]
    cycles = dict.fromkeys(decoded, 0)
    for row in rows:
        tokens = cache.read(row).token_ids_S.tolist()
        for way in decoded:
            response, count = decoder.decode(tokens[: row.prompt_len], max_new_tokens, way)
            assert response == tokens[row.prompt_len :], "decoding with drafts must give the target's greedy tokens"
            cycles[way] += count
    assert {way: report.num_cycles[way] for way in decoded} == cycles
    return report.alpha
