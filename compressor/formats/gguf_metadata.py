"""What llama.cpp must know besides the weights: shape of the model, tokenizer, chat template.

The keys are those of llama.cpp's own converter; tests compare the two files key by key.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import tokenizers
import torch
from torch import Tensor

import compressor
from compressor.errors import ModelError
from compressor.formats.headers import read_json

DTYPE_KEY = "compressor.dtype"
QUANTIZER_KEY = "compressor.quantizer"
ROUNDED_KEY = "compressor.rounded"
_ROPE_TYPES = ("default", "linear", "llama3")
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_SPACES = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# How a tokenizer cuts text into words before merging, and llama.cpp's name for it.
_PRE_TOKENIZERS: Mapping[tuple[str, ...], str] = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (_CONTRACTIONS + r"\p{N}{1,3}" + _SPACES, "bytes"): "llama-bpe",
    (_CONTRACTIONS + r"\p{N}" + _SPACES, "bytes"): "qwen2",
}


def check(checkpoint: Path) -> None:
    """Refuse what a GGUF of this model would get wrong; reads no weight.

    Raises:
        ModelError: positions, attention or tokenizer are of a kind that is not written.
    """
    config = read_json(checkpoint / "config.json")
    rope = _rope(config)
    if rope.get("rope_type", "default") not in _ROPE_TYPES:
        raise ModelError(f"GGUF export does not write positions of type {rope['rope_type']!r}")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ModelError("GGUF export does not write sliding windows of attention")
    if config.get("hidden_act", "silu") != "silu":
        raise ModelError(f"llama.cpp computes SiLU, not {config['hidden_act']!r}, in this family")
    pre_tokenizer(read_json(checkpoint / "tokenizer.json"))


def pre_tokenizer(tokenizer: Mapping[str, Any]) -> str:
    """llama.cpp's name for the way a `tokenizer.json` cuts text into words.

    Raises:
        ModelError: it is no byte-level BPE, or cuts in a way that has no name here.
    """
    if tokenizer["model"].get("type") != "BPE" or tokenizer["model"].get("byte_fallback"):
        raise ModelError("GGUF export writes byte-level BPE tokenizers only")
    normalizer = (tokenizer.get("normalizer") or {}).get("type")
    steps = tokenizer.get("pre_tokenizer") or {}
    found = tuple(_step(step) for step in steps.get("pretokenizers", [steps]))
    if found not in _PRE_TOKENIZERS or normalizer not in (None, "NFC"):
        raise ModelError(
            "llama.cpp's name for this tokenizer's way of cutting words is not known",
            f"known: {', '.join(_PRE_TOKENIZERS.values())}",
        )
    return _PRE_TOKENIZERS[found]


def _step(step: Mapping[str, Any]) -> str:
    kind = str(step.get("type"))
    if kind == "Split":
        isolated = step["behavior"] == "Isolated" and not step["invert"]
        return str(step["pattern"].get("Regex")) if isolated else kind
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "ByteLevel" if step.get("use_regex", True) else "bytes"
    if kind == "Digits" and not step["individual_digits"]:
        return "digits"
    return kind if kind != "ByteLevel" else "prefixed"


def _rope(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Parameters of rotary positions, under the new name and the old ones."""
    found = config.get("rope_parameters") or config.get("rope_scaling") or {}
    base = {"rope_theta": config.get("rope_theta", 10000.0)}
    kind = {"rope_type": found["type"]} if "type" in found else {}
    return {**base, **kind, **found}


def head_dim(config: Mapping[str, Any]) -> int:
    """Width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def add_metadata(
    writer: gguf.GGUFWriter,
    checkpoint: Path,
    file_type: int,
    dtype: torch.dtype,
    *,
    tokenizer: Path | None = None,
) -> None:
    """Everything but tensors.

    Args:
        writer: made for the model's architecture.
        checkpoint: has passed `check`.
        file_type: llama.cpp's number for the commonest type of block.
        dtype: of the checkpoint's scales and dense weights, to read the file back.
        tokenizer: checkpoint that has it, for a draft without one.
    """
    config = read_json(checkpoint / "config.json")
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_name(str(config.get("_name_or_path") or checkpoint.name))
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_string("compressor.version", compressor.__version__)
    writer.add_string(DTYPE_KEY, str(dtype).removeprefix("torch."))
    _add_shape(writer, config)
    _add_tokenizer(writer, tokenizer or checkpoint, int(config["vocab_size"]))


def _add_shape(writer: gguf.GGUFWriter, config: Mapping[str, Any]) -> None:
    heads, rope = config["num_attention_heads"], _rope(config)
    writer.add_vocab_size(config["vocab_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(head_dim(config))
    writer.add_value_length(head_dim(config))
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_dim(config))
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def configuration(fields: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """What a `config.json` would say of the shapes that a file's metadata describe.

    Args:
        fields: metadata by key.
        names: of the tensors, as in a checkpoint.
    """
    family = str(fields["general.architecture"])
    own = {key.removeprefix(f"{family}."): value for key, value in fields.items()}
    return {
        "model_type": family,
        "vocab_size": own["vocab_size"],
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": own["block_count"],
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": own["attention.key_length"],
        "max_position_embeddings": own["context_length"],
        "rms_norm_eps": own["attention.layer_norm_rms_epsilon"],
        "tie_word_embeddings": "lm_head.weight" not in names,
        "attention_bias": any(name.endswith("q_proj.bias") for name in names),
        "dtype": fields[DTYPE_KEY],
    }


def rope_factors(config: Mapping[str, Any]) -> Tensor | None:
    """Divisors of the rotary frequencies [head_dim / 2] of Llama 3.1, fp32; None elsewhere.

    Source: Llama 3.1's `apply_scaling`, as transformers computes it in `rope_utils`.
    """
    rope = _rope(config)
    if rope.get("rope_type") != "llama3":
        return None
    width = head_dim(config)
    frequency = rope["rope_theta"] ** -(torch.arange(0, width, 2, dtype=torch.float32) / width)
    turns = rope["original_max_position_embeddings"] * frequency / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    smooth = ((turns - low) / (high - low)).clamp(0, 1)
    factors: Tensor = 1 / ((1 - smooth) / rope["factor"] + smooth)
    return factors


def _add_tokenizer(writer: gguf.GGUFWriter, checkpoint: Path, size: int) -> None:
    path = checkpoint / "tokenizer.json"
    tokenizer = read_json(path)
    words, types = _vocabulary(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(tokenizer))
    writer.add_token_list(words)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(checkpoint, load_merges=True, n_vocab=size)
    special.add_special_token = _added(path, special.special_token_ids)
    special.add_to_gguf(writer, quiet=True)


def _vocabulary(tokenizer: Mapping[str, Any], size: int) -> tuple[Sequence[str], Sequence[int]]:
    """Every token by its id; ids that the tokenizer does not use are named as unused."""
    kinds = gguf.TokenType
    words = [f"[PAD{number}]" for number in range(size)]
    types = [int(kinds.UNUSED)] * size
    for word, number in tokenizer["model"]["vocab"].items():
        words[number], types[number] = word, int(kinds.NORMAL)
    for added in tokenizer["added_tokens"]:
        kind = kinds.CONTROL if added["special"] else kinds.USER_DEFINED
        words[added["id"]], types[added["id"]] = added["content"], int(kind)
    return words, types


def _added(path: Path, special: Mapping[str, int]) -> dict[str, bool]:
    """Whether encoding a text puts the first and last tokens around it; seen, not guessed."""
    encoder = tokenizers.Tokenizer.from_str(json.dumps(read_json(path)))
    bare, full = (encoder.encode("a", add_special_tokens=add).ids for add in (False, True))
    begins = len(full) > len(bare) and full[0] == special.get("bos")
    ends = len(full) > len(bare) and full[-1] == special.get("eos")
    return {"bos": begins, "eos": ends}
