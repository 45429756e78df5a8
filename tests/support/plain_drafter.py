"""The drafter written out plainly: one dense mask over [context ; all blocks], a loop over heads."""

# T context tokens, N blocks, G block size, M = N * G positions of all blocks, D context features (K layers x H)
# H hidden width, d head width
from collections.abc import Mapping

import torch
from torch import Tensor
from vpd.stages.drafter.model import Drafter
from vpd.stages.drafter.shape import DrafterShape


def random_drafter(shape: DrafterShape, seed: int = 0) -> Drafter:
    """Weights large enough that attention is far from uniform, and norms that are not one."""
    generator = torch.Generator().manual_seed(seed)
    drafter = Drafter(shape)
    with torch.no_grad():
        for parameter in drafter.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=1.5 * parameter.shape[1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return drafter


def plain_drafter(
    weights: Mapping[str, Tensor], shape: DrafterShape, features_TD: Tensor, blocks_NGH: Tensor, anchors: list[int]
) -> Tensor:
    (T, _), (N, G, H) = features_TD.shape, blocks_NGH.shape
    eps = shape.rms_norm_eps
    positions = [*range(T), *(anchor + k for anchor in anchors for k in range(G))]
    seen = [
        [position < anchor for position in range(T)] + [other == block for other in range(N) for _ in range(G)]
        for block, anchor in enumerate(anchors)
        for _ in range(G)
    ]
    context_TH = rms_norm(features_TD @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    states_MH = blocks_NGH.reshape(N * G, H)
    for i in range(shape.num_layers):
        layer = {name.removeprefix(f"layers.{i}."): value for name, value in weights.items()}
        normed_MH = rms_norm(states_MH, layer["input_layernorm.weight"], eps)
        attended = plain_attention(layer, shape, context_TH, normed_MH, positions, torch.tensor(seen))
        states_MH = states_MH + attended
        normed_MH = rms_norm(states_MH, layer["post_attention_layernorm.weight"], eps)
        gate, up = normed_MH @ layer["mlp.gate_proj.weight"].T, normed_MH @ layer["mlp.up_proj.weight"].T
        states_MH = states_MH + (gate / (1 + torch.exp(-gate)) * up) @ layer["mlp.down_proj.weight"].T
    return rms_norm(states_MH, weights["norm.weight"], eps).reshape(N, G, H)


def plain_attention(
    layer: Mapping[str, Tensor],
    shape: DrafterShape,
    context_TH: Tensor,
    states_MH: Tensor,
    positions: list[int],
    seen: Tensor,
) -> Tensor:
    d, per_group = shape.head_dim, shape.num_attention_heads // shape.num_key_value_heads
    everything = torch.cat([context_TH, states_MH])
    own_positions = positions[len(context_TH) :]
    mixed = []
    for head in range(shape.num_attention_heads):
        rows = slice(head * d, (head + 1) * d)
        kv_rows = slice(head // per_group * d, (head // per_group + 1) * d)
        query = states_MH @ layer["self_attn.q_proj.weight"][rows].T
        key = everything @ layer["self_attn.k_proj.weight"][kv_rows].T
        value = everything @ layer["self_attn.v_proj.weight"][kv_rows].T
        query = rms_norm(query, layer["self_attn.q_norm.weight"], shape.rms_norm_eps)
        key = rms_norm(key, layer["self_attn.k_norm.weight"], shape.rms_norm_eps)
        query, key = turn(query, own_positions, shape.rope_theta), turn(key, positions, shape.rope_theta)
        likeness = torch.where(seen, torch.exp(query @ key.T / d**0.5), 0.0)
        mixed.append(likeness / likeness.sum(dim=1, keepdim=True) @ value)
    return torch.cat(mixed, dim=1) @ layer["self_attn.o_proj.weight"].T


def rms_norm(states: Tensor, weight: Tensor, eps: float) -> Tensor:
    return states / ((states * states).mean(dim=-1, keepdim=True) + eps).sqrt() * weight


def turn(states_Md: Tensor, positions: list[int], theta: float) -> Tensor:
    """RoPE: entries j and j + d/2 are a complex number, turned by position * theta^(-2j/d)."""
    half = states_Md.shape[1] // 2
    real, imaginary = [], []
    for j in range(half):
        angles = torch.tensor(positions, dtype=torch.float64) * theta ** (-j / half)
        turned = torch.complex(states_Md[:, j], states_Md[:, j + half]) * torch.exp(1j * angles)
        real.append(turned.real)
        imaginary.append(turned.imag)
    return torch.stack(real + imaginary, dim=1)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, relative to the largest entry."""
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())
