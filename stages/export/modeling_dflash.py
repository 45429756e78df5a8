"""The model of a DFlash drafter (arXiv 2602.06036), for `AutoModel.from_pretrained(..., trust_remote_code=True)`.

The drafter fills a block of masked tokens in one pass. It reads hidden states of the target, and has neither an
embedding nor an LM head: the target's embedding makes its input, and the target's LM head reads its output.

This file needs PyTorch and transformers alone.
"""

# B batch, T context tokens, G block size, S = T + G, K context layers, H hidden width
# h query heads, k key-value heads, d head width

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, Qwen3Config


class DFlashDraftModel(PreTrainedModel):
    """Maps the target's states and an embedded block to the block's hidden states, ready for the target's LM head."""

    config_class = Qwen3Config
    main_input_name = "noise_embedding"

    def __init__(self, config: Any):
        super().__init__(config)
        self.block_size: int = config.block_size
        self.mask_token_id: int = config.dflash_config["mask_token_id"]
        self.target_layer_ids: list[int] = config.dflash_config["target_layer_ids"]
        width, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(len(self.target_layer_ids) * width, width, bias=False)
        self.hidden_norm = nn.RMSNorm(width, eps=eps)
        self.layers = nn.ModuleList([Layer(config) for _ in range(config.num_hidden_layers)])
        self.norm = nn.RMSNorm(width, eps=eps)
        self.post_init()

    def forward(self, noise_embedding: Tensor, target_hidden: Tensor, position_ids: Tensor | None = None) -> Tensor:
        """Hidden states [B, G, H] of the block.

        Args:
            noise_embedding: [B, G, H], the target's embedding of the last token and of G - 1 mask tokens.
            target_hidden: [B, T, K * H], the outputs of the target's layers `target_layer_ids`, side by side, at all
                tokens before the last one.
            position_ids: int64 [B, T + G]; None: 0, 1, 2 and so on.
        """
        context = self.hidden_norm(self.fc(target_hidden))
        if position_ids is None:
            num_positions = context.shape[1] + noise_embedding.shape[1]
            position_ids = torch.arange(num_positions, device=context.device)[None]
        rope = rotary(position_ids, self.config, noise_embedding.dtype)
        states = noise_embedding
        for layer in self.layers:
            states = layer(states, context, rope)
        return self.norm(states)


class Layer(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, states: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        states = states + self.self_attn(self.input_layernorm(states), context, rope)
        return states + self.mlp(self.post_attention_layernorm(states))


class Attention(nn.Module):
    """Each position of the block attends to the context and to the whole block, without a mask."""

    def __init__(self, config: Any):
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.rms_norm_eps)

    def forward(self, states: Tensor, context: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        seen = torch.cat([context, states], dim=1)
        query_BhGd = rotate(self.q_norm(self.heads(self.q_proj(states))), rope)
        key_BkSd = rotate(self.k_norm(self.heads(self.k_proj(seen))), rope)
        value_BkSd = self.heads(self.v_proj(seen))
        mixed_BhGd = F.scaled_dot_product_attention(query_BhGd, key_BkSd, value_BkSd, enable_gqa=True)
        return self.o_proj(mixed_BhGd.transpose(1, 2).flatten(2))

    def heads(self, states: Tensor) -> Tensor:
        return states.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class MLP(nn.Module):
    def __init__(self, config: Any):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, states: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(states)) * self.up_proj(states))


def rotary(position_ids: Tensor, config: Any, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, 1, S, d], computed in float32."""
    theta, d = config.rope_parameters["rope_theta"], config.head_dim
    frequencies = theta ** (-torch.arange(0, d, 2, device=position_ids.device, dtype=torch.float32) / d)
    angles = (position_ids[..., None].float() * frequencies).repeat(1, 1, 2)[:, None]
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotates [B, heads, n, d] by the last n positions; the two halves of a head make the pairs."""
    cosine, sine = (part[:, :, -heads.shape[2] :] for part in rope)
    first, second = heads.chunk(2, dim=-1)
    return heads * cosine + torch.cat([-second, first], dim=-1) * sine
