"""The drafter: Qwen3-style layers that fill masked blocks, given the target's states before each anchor.

The architecture is that of DFlash (arXiv 2602.06036), for first drafters and VP-Drafters alike. The two differ in the
number of visible tokens of a block.
"""

# T context tokens, N blocks, G block size, D context features (K layers x H), H hidden width
# h query heads, k key-value heads, r = h / k, d head width
from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .attention import Attend, LayerContext, make_layout, plan_attention
from .compiling import set_up_compiler
from .shape import DrafterShape

INIT_STD = 0.02

recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
"""Calls a function; the backward pass calls it again, so that only its arguments are kept in memory."""


class Context(NamedTuple):
    """The context of one sequence, or of several packed one after another."""

    layers: list[LayerContext]
    num_tokens: tuple[int, ...]
    """Tokens of each sequence; their sum is T."""


class Drafter(nn.Module):
    """Predicts all positions of a block at once. Embedding and LM head are the target's, and no part of the drafter."""

    def __init__(self, shape: DrafterShape, attention: str = "structured"):
        """
        Args:
            attention: how blocks attend: eager, structured or flex.
        """
        super().__init__()
        self.shape, self.attention = shape, attention
        eps = shape.rms_norm_eps
        self.fc = nn.Linear(len(shape.target_layer_ids) * shape.hidden_size, shape.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(shape.hidden_size, eps=eps)
        self.layers = nn.ModuleList([DrafterLayer(shape) for _ in range(shape.num_layers)])
        self.norm = RMSNorm(shape.hidden_size, eps=eps)

    def init_weights(self, generator: torch.Generator) -> None:
        """Draws all matrices from a normal distribution; norms start at one."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=INIT_STD, generator=generator)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def compile_layers(self) -> None:
        """Has PyTorch compile the layers, once for all numbers of tokens and blocks."""
        set_up_compiler()
        for layer in self.layers:
            layer.compile(fullgraph=True, dynamic=True)

    def context(self, features_TD: Tensor, num_tokens: Sequence[int] | None = None) -> Context:
        """Keys and values of every layer for the context features [T, D].

        Args:
            num_tokens: tokens of each sequence that is packed in T, each with positions from 0 on; None: one sequence.
        """
        num_tokens = (len(features_TD),) if num_tokens is None else tuple(num_tokens)
        states_TH = self.hidden_norm(self.fc(features_TD))
        positions_T = torch.cat([torch.arange(count, device=states_TH.device) for count in num_tokens])
        rope = rotary(positions_T, self.shape, states_TH.dtype)
        layers = [cast(DrafterLayer, layer).self_attn.context(states_TH, rope) for layer in self.layers]
        return Context(layers, num_tokens)

    def forward(
        self,
        blocks_NGH: Tensor,
        anchors_N: Tensor,
        context: Context,
        num_blocks: Sequence[int] | None = None,
        wanted_P: Tensor | None = None,
    ) -> Tensor:
        """Hidden states of the blocks [N, G, H], or of the wanted positions [P, H], ready for the target's LM head.

        Args:
            blocks_NGH: embedded tokens of the blocks, the mask token's embedding where the drafter must predict.
            anchors_N: int64, the anchors' positions in their sequences; block n sees the context of its sequence
                strictly before anchors_N[n].
            context: the result of `context` for the blocks' sequences.
            num_blocks: blocks of each sequence, one sequence after another; None: one sequence.
            wanted_P: int64, indices into the N * G positions; the last layer does not compute the others.
        """
        num_blocks = (len(blocks_NGH),) if num_blocks is None else tuple(num_blocks)
        offsets_G = torch.arange(blocks_NGH.shape[1], device=blocks_NGH.device)
        rope = rotary(anchors_N[:, None] + offsets_G, self.shape, blocks_NGH.dtype)
        layout = make_layout(anchors_N, context.num_tokens, num_blocks, blocks_NGH.shape[1])
        attend = plan_attention(self.attention, layout, blocks_NGH.dtype)
        states = blocks_NGH
        for i, (layer, layer_context) in enumerate(zip(self.layers, context.layers, strict=True)):
            wanted = wanted_P if i == len(self.layers) - 1 else None
            is_small = layout.is_small or (wanted is not None and len(wanted) < 2)
            # The compiled layer serves all sizes except the smallest, which PyTorch would compile separately.
            compute = layer.forward if is_small else layer
            states = compute(states, rope, layer_context, attend, wanted)
        return self.norm(states)


class RMSNorm(nn.RMSNorm):
    """Computes in its input's dtype, since no fused kernel takes float32 weights with bfloat16 states."""

    def forward(self, x: Tensor) -> Tensor:
        # Without the GPU's fused kernel, PyTorch would keep several float32 copies of x for the backward pass.
        return self._normalize(x) if x.is_cuda else recompute(self._normalize, x)

    def _normalize(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class DrafterLayer(nn.Module):
    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.self_attn = BlockAttention(shape)
        self.mlp = SwiGLU(shape)
        self.input_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)

    def forward(
        self,
        states_NGH: Tensor,
        rope: tuple[Tensor, Tensor],
        context: LayerContext,
        attend: Attend,
        wanted_P: Tensor | None = None,
    ) -> Tensor:
        mixed = self.self_attn(self.input_layernorm(states_NGH), rope, context, attend, wanted_P)
        states = select(states_NGH, wanted_P) + mixed
        return states + self.mlp(self.post_attention_layernorm(states))


def select(states_NGH: Tensor, wanted_P: Tensor | None) -> Tensor:
    """The states of the wanted positions [P, H]; all states [N, G, H] if `wanted_P` is None."""
    return states_NGH if wanted_P is None else states_NGH.flatten(0, 1)[wanted_P]


class SwiGLU(nn.Module):
    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        inputs = self.gate_proj(states), self.up_proj(states), self.down_proj.weight
        # A compiled backward pass recomputes only what it needs, which leaves out the linear layer.
        if torch.compiler.is_compiling():
            return recompute(gated_linear, *inputs)
        return cast(Tensor, GatedLinear.apply(*inputs))


def gated_linear(gates: Tensor, values: Tensor, weight: Tensor) -> Tensor:
    return F.linear(F.silu(gates) * values, weight)


class GatedLinear(torch.autograd.Function):
    """`gated_linear` that recomputes the product in the backward pass, which is cheap and saves memory."""

    @staticmethod
    def forward(ctx: Any, gates: Tensor, values: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(gates, values, weight)
        return gated_linear(gates, values, weight)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        gates, values, weight = ctx.saved_tensors
        (gradient,) = grad_outputs
        activated = F.silu(gates)
        grad_weight = gradient.flatten(0, -2).T @ (activated * values).flatten(0, -2)
        grad_product = gradient @ weight.to(gradient.dtype)
        grad_gates = torch.ops.aten.silu_backward(grad_product * values, gates)
        return grad_gates, grad_product * activated, grad_weight.to(weight.dtype)


class BlockAttention(nn.Module):
    """Each block attends to the context before its anchor and, in both directions, to itself."""

    def __init__(self, shape: DrafterShape):
        super().__init__()
        self.num_heads, self.num_kv_heads = shape.num_attention_heads, shape.num_key_value_heads
        self.head_dim = shape.head_dim
        width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, shape.hidden_size, bias=False)
        self.q_norm = RMSNorm(self.head_dim, eps=shape.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, eps=shape.rms_norm_eps)

    def context(self, states_TH: Tensor, rope: tuple[Tensor, Tensor]) -> LayerContext:
        key_Tkd, value_Tkd = self._keys_values(states_TH, rope)
        return LayerContext(key_Tkd.transpose(0, 1), value_Tkd.transpose(0, 1))

    def forward(
        self,
        states_NGH: Tensor,
        rope: tuple[Tensor, Tensor],
        context: LayerContext,
        attend: Attend,
        wanted_P: Tensor | None,
    ) -> Tensor:
        N, G, _ = states_NGH.shape
        query_NGhd = self.q_proj(states_NGH).view(N, G, self.num_heads, self.head_dim)
        key_NGkd, value_NGkd = self._keys_values(states_NGH, rope)
        mixed_NGhd = attend(rotate(self.q_norm(query_NGhd), rope), key_NGkd, value_NGkd, context)
        return self.o_proj(select(mixed_NGhd.flatten(2), wanted_P))

    def _keys_values(self, states: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        split = (*states.shape[:-1], self.num_kv_heads, self.head_dim)
        return rotate(self.k_norm(self.k_proj(states).view(split)), rope), self.v_proj(states).view(split)


def rotary(positions: Tensor, shape: DrafterShape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [*positions, 1, d] of the rotary embedding, computed in float32."""
    half = torch.arange(0, shape.head_dim, 2, device=positions.device, dtype=torch.float32)
    angles = positions[..., None].float() * shape.rope_theta ** (-half / shape.head_dim)
    angles = torch.cat([angles, angles], dim=-1)[..., None, :]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(states: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Applies the rotary embedding to [..., heads, d], halves paired as in Llama and Qwen3."""
    cosine, sine = rope
    first, second = states.chunk(2, dim=-1)
    return states * cosine + torch.cat([-second, first], dim=-1) * sine
