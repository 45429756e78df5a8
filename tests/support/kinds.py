"""Tiny random targets of many architectures."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from vpd.stages.extract.architecture import auto_class

from support.tiny import END, HIDDEN, TARGET_SHAPE, make_tokenizer

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
ROUTED_EXPERTS = {
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "n_shared_experts": 1},
    **{"first_k_dense_replace": 1, "n_group": 2, "topk_group": 1, "topk_method": "noaux_tc"},
}
LATENT_ATTENTION = {
    **{"q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 32, "v_head_dim": 32},
    **{"num_key_value_heads": 4, "head_dim": 16},
}
STATE_SPACE = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_chunk_size": 16}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": HIDDEN}
SECTIONS = {"rope_theta": 10000.0, "rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True}
SOFT_CAPS = {"final_logit_softcapping": 5.0, "attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 32}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama, tied": ("llama", {"tie_word_embeddings": True}),
    "Llama, untied": ("llama", {"tie_word_embeddings": False}),
    "Qwen2": ("qwen2", {"tie_word_embeddings": False}),
    "Qwen3": ("qwen3", {"tie_word_embeddings": False}),
    "Qwen3-MoE": ("qwen3_moe", {"tie_word_embeddings": False, **EXPERTS}),
    "Qwen2-MoE": ("qwen2_moe", {**EXPERTS, "shared_expert_intermediate_size": 64}),
    "OLMoE": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "DeepSeek-V3": ("deepseek_v3", {**ROUTED_EXPERTS, **LATENT_ATTENTION}),
    "Bamba": ("bamba", {"attn_layer_indices": [1, 3, 5], **STATE_SPACE}),
    "Qwen3-Next": (
        "qwen3_next",
        {
            **EXPERTS,
            "shared_expert_intermediate_size": 64,
            "linear_num_value_heads": 2,
            "linear_num_key_heads": 1,
            "linear_key_head_dim": 64,
            "linear_value_head_dim": 64,
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
VISION_KINDS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Qwen3-VL": ("qwen3_vl", {"model_type": "qwen3_vl_text", "rope_parameters": SECTIONS}, VISION),
}
"""Name -> model type, the settings of the text tower that differ from `TARGET_SHAPE`, and the vision tower's."""


def save_kind(name: str, folder: Path) -> Path:
    """Saves a target of a kind with random weights; its norms are random too, not the identity."""
    tokenizer = make_tokenizer()
    end = tokenizer.get_vocab()[END]
    torch.manual_seed(2)
    shape = TARGET_SHAPE | {"eos_token_id": end, "pad_token_id": None}
    if name in VISION_KINDS:
        kind, changes, vision = VISION_KINDS[name]
        config = AutoConfig.for_model(kind, text_config=shape | changes, vision_config=vision)
    else:
        kind, changes = KINDS[name]
        config = AutoConfig.for_model(kind, **shape | changes)
    model = auto_class(config).from_config(config, dtype=torch.float32)
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
