"""Candidates of a decoding cycle: which second drafts to launch, and which alternatives to try without one."""

# N anchors, G block size, A alternatives kept per position (the first is the draft), B branches
from __future__ import annotations

import torch
from torch import Tensor


def boundary_posterior(confidence_NG: Tensor) -> Tensor:
    """r(i) = (c_1 ... c_i) * (1 - c_(i+1)), i = 0..G-2 (D2SD, arXiv 2606.04446); confidences c_1..c_(G-1) [N, G-1]."""
    reached = torch.cat([torch.ones_like(confidence_NG[:, :1]), confidence_NG.cumprod(dim=1)[:, :-1]], dim=1)
    return reached * (1 - confidence_NG)


def paper_prefixes(confidence_NG: Tensor, num_branches: int) -> Tensor:
    """The B prefix lengths [N, B] of largest r(i): as many as asked for, or all G-1 of them."""
    posterior = boundary_posterior(confidence_NG)
    return posterior.topk(min(num_branches, posterior.shape[1]), dim=1).indices


def swapped_candidates(tokens_NGA: Tensor, probs_NGA: Tensor, num_branches: int) -> Tensor:
    """The first draft with one token swapped for its j-th alternative, for the B most likely pairs; [N, B, G-1].

    A pair's score is the probability that the draft holds up to position i and the alternative is right at i+1:
    (c_1 ... c_i) * p_(i+1)(alternative j).
    """
    draft_NG, confidence_NG = tokens_NGA[..., 0], probs_NGA[..., 0]
    reached = torch.cat([torch.ones_like(confidence_NG[:, :1]), confidence_NG.cumprod(dim=1)[:, :-1]], dim=1)
    scores = (reached[..., None] * probs_NGA[..., 1:]).flatten(1)
    pairs_NB = scores.topk(min(num_branches, scores.shape[1]), dim=1).indices
    swapped = tokens_NGA[..., 1:].flatten(1).gather(1, pairs_NB)
    position_NB = pairs_NB // (tokens_NGA.shape[2] - 1)
    candidates = draft_NG[:, None, :].repeat(1, pairs_NB.shape[1], 1)
    return candidates.scatter_(2, position_NB[..., None], swapped[..., None])
