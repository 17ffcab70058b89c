"""Small random models of every family, written the way transformers writes them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "n_inner": 56}
_TYPES = ["sliding_attention", "full_attention"]
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}

# Every family, and the switches of its configuration that change its tensors or its arithmetic.
VARIANTS: dict[str, tuple[str, dict[str, object]]] = {
    "llama": ("llama", {}),
    "llama-tied-biased": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 16},
    ),
    "llama-scaled-rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 100.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "llama-dynamic-rope": (
        "llama",
        {
            "max_position_embeddings": 8,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0},
        },
    ),
    "mistral": ("mistral", {"sliding_window": 4}),
    "qwen2": ("qwen2", {}),
    "qwen2-tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 8}),
    "qwen3-biased": ("qwen3", {"head_dim": 16, "attention_bias": True}),
    "gemma2": ("gemma2", {"head_dim": 8, "sliding_window": 4, "query_pre_attn_scalar": 8}),
    "gemma2-untied": ("gemma2", {"head_dim": 8, "tie_word_embeddings": False}),
    "gemma3": (
        "gemma3_text",
        {"head_dim": 8, "sliding_window": 4, "layer_types": _TYPES, "query_pre_attn_scalar": 8},
    ),
    "phi3": ("phi3", {}),
    "phi3-long-rope": (
        "phi3",
        {
            "original_max_position_embeddings": 8,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 100.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 8,
            },
        },
    ),
    "olmo2": ("olmo2", {}),
    "smollm3": ("smollm3", {"no_rope_layers": [1, 0]}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.2,
        },
    ),
    "gpt_neox": ("gpt_neox", {}),
    "gpt_neox-sequential": ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False}),
    "opt": ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "opt-postnorm": (
        "opt",
        {"ffn_dim": 48, "word_embed_proj_dim": 24, "do_layer_norm_before": False},
    ),
    "opt-plain": (
        "opt",
        {
            "ffn_dim": 48,
            "word_embed_proj_dim": 32,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
            "tie_word_embeddings": False,
        },
    ),
    "gpt2": ("gpt2", _GPT2),
    "gpt2-untied": ("gpt2", {**_GPT2, "n_inner": None, "tie_word_embeddings": False}),
    "mixtral": ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 2}),
    "qwen3_moe": ("qwen3_moe", {**_MOE, "num_experts": 3}),
    "qwen3_moe-mixed": ("qwen3_moe", {**_MOE, "num_experts": 3, "mlp_only_layers": [0]}),
}


def build(
    variant: str, dtype: torch.dtype = torch.float32, **changes: object
) -> transformers.PreTrainedModel:
    """A random model; every parameter is perturbed, so that no bias is zero and no norm one."""
    model_type, options = VARIANTS[variant]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **{**SIZES, **options, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Directory of the checkpoint of a variant, written once per session."""
    written: dict[tuple[str, torch.dtype], Path] = {}

    def get(variant: str, dtype: torch.dtype = torch.float32) -> Path:
        if (variant, dtype) not in written:
            folder = tmp_path_factory.mktemp(variant)
            build(variant, dtype).save_pretrained(folder)
            written[variant, dtype] = folder
        return written[variant, dtype]

    return get


def config_of(folder: Path) -> dict[str, object]:
    return json.loads((folder / "config.json").read_text())
