"""Which responses of a cached sequence can be replayed, and how many cycles they take.

Everything here follows from the recorded tokens. Replay checks training, so this file shares no code with training.
"""

# S tokens of a sequence, T with a state, N anchors, J = G - 1 drafted positions, C ways of decoding
from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...data.cache.reader import CachedTokens

BEYOND = -2
"""Stands for "no recorded token"; equal to no drafted token."""


def find_responses(loss_mask_S: Tensor) -> list[tuple[int, int]]:
    """Start and end (exclusive) of every run of assistant tokens."""
    mask = [False, *loss_mask_S.tolist(), False]
    starts = [i for i in range(len(mask) - 1) if mask[i + 1] and not mask[i]]
    ends = [i for i in range(len(mask) - 1) if mask[i] and not mask[i + 1]]
    return list(zip(starts, ends, strict=True))


def is_greedy(sequence: CachedTokens, span: tuple[int, int]) -> bool:
    """Whether every token of a response is the target's greedy choice after the tokens before it."""
    start, end = span
    if start == 0:
        return False
    return torch.equal(sequence.token_ids_S[start:end], sequence.target_argmax_T[start - 1 : end - 1])


def replayable_responses(sequence: CachedTokens) -> tuple[list[tuple[int, int]], str]:
    """The greedy responses of at least two tokens, and the reason in case there is none."""
    responses = find_responses(sequence.loss_mask_S)
    greedy = [span for span in responses if is_greedy(sequence, span)]
    usable = [(start, end) for start, end in greedy if end - start > 1]
    if greedy:
        return usable, "a response of one token"
    return [], "not the target's greedy output" if responses else "no response"


def recorded_after(token_ids_S: Tensor, span: tuple[int, int], num_positions: int) -> Tensor:
    """The J tokens after each anchor of a response, `BEYOND` past the response: [N, J].

    The anchors are the response's N = end - start - 1 tokens before its last one.
    """
    start, end = span
    padded = torch.cat([token_ids_S[start + 1 : end], token_ids_S.new_full((num_positions,), BEYOND)])
    return padded.unfold(0, num_positions, 1)[: end - start - 1]


def visited_anchors(accept_lens_NC: np.ndarray) -> np.ndarray:
    """The anchors (bool [N, C]) at which the cycles begin that complete a response.

    The cycle at the i-th anchor commits accept_lens_NC[i] tokens and a bonus. The response has N + 1 tokens. The
    prefill gives the first one, and nothing past the last one is committed.
    """
    num_anchors, num_ways = accept_lens_NC.shape
    visited_NC = np.zeros((num_anchors, num_ways), bool)
    ways_C = np.arange(num_ways if num_anchors else 0)
    position_C = np.zeros_like(ways_C)
    while len(ways_C):
        visited_NC[position_C, ways_C] = True
        position_C = position_C + accept_lens_NC[position_C, ways_C] + 1
        is_running = position_C < num_anchors
        position_C, ways_C = position_C[is_running], ways_C[is_running]
    return visited_NC
