"""Tiny random targets of many architectures."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from support.tiny import END, TARGET_SHAPE, make_tokenizer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
SOFT_CAPS = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Llama, untied": ("llama", {"tie_word_embeddings": False}),
    "Qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "Qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "Qwen3-MoE": ("qwen3_moe", {"tie_word_embeddings": False, **EXPERTS}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 64,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "full_attention_interval": 2,
        },
    ),
    "Mistral": ("mistral", {"sliding_window": 16}),
    "Mixtral": ("mixtral", LOCAL_EXPERTS),
    "Gemma": ("gemma", {"hidden_activation": "gelu_pytorch_tanh"}),
    "Gemma 2": ("gemma2", {"sliding_window": 16, **SOFT_CAPS}),
    "Gemma 3": ("gemma3_text", {"sliding_window": 16, "query_pre_attn_scalar": 32, "final_logit_softcapping": 5.0}),
    "Gemma 4": (
        "gemma4_text",
        {"sliding_window": 16, "final_logit_softcapping": 5.0, "hidden_size_per_layer_input": 0},
    ),
    "gpt-oss": ("gpt_oss", {"sliding_window": 16, **LOCAL_EXPERTS}),
    "Granite": (
        "granite",
        {"logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.5, "attention_multiplier": 0.1},
    ),
    "Cohere": ("cohere", {"logit_scale": 0.25}),
    "Cohere 2": ("cohere2", {"logit_scale": 0.25, "sliding_window": 16}),
    "GLM-4": ("glm4", {}),
    "OLMo 2": ("olmo2", {}),
    "Phi-3": ("phi3", {}),
    "SmolLM3": ("smollm3", {}),
    "StarCoder 2": ("starcoder2", {"use_bias": True}),
    "StableLM": ("stablelm", {}),
    "Nemotron": ("nemotron", {}),
}
"""Name -> transformers' model type, and the settings that differ from `TARGET_SHAPE`."""


def save_kind(name: str, folder: Path) -> Path:
    """Saves a target of a kind with random weights; its norms are random too, not the identity."""
    kind, changes = KINDS[name]
    tokenizer = make_tokenizer()
    end = tokenizer.get_vocab()[END]
    torch.manual_seed(2)
    config = AutoConfig.for_model(kind, **TARGET_SHAPE | {"eos_token_id": end, "pad_token_id": None} | changes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter += 0.3 * torch.randn_like(parameter)
        head = model.get_output_embeddings().weight
        head[len(tokenizer) :] *= 0.1  # no answer has a token that the tokenizer lacks
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=end)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
