"""Round a model with llm-compressor; runs in the environment of that peer, not in ours.

    python llm_compressor.py MODEL TOKENS OUT --method rtn|gptq|awq --bits N [--dtype float32]
        [--group-size 64] [--observer memoryless_mse]

TOKENS is a safetensors file with `input_ids` int64 [rows, length]. Symmetric groups, head kept.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer


def scheme(options: argparse.Namespace) -> dict[str, Any]:
    """What every modifier is told of the weights."""
    weights = {
        "num_bits": options.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": options.group_size,
    }
    if options.observer:
        weights["observer"] = options.observer
    return {"config_groups": {"all": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["lm_head"]}  # fmt: skip


def allow_awq_without_accelerator() -> None:
    """0.14.0.1 pins its cached activations for a GPU's sake, which fails where there is none."""
    if not torch.accelerator.is_available():
        IntermediatesCache.pin_memory = lambda *_: None


def recipe(options: argparse.Namespace) -> list[Any]:
    """The modifiers of a method, as the project's examples chain them."""
    if options.method == "gptq":
        return [GPTQModifier(**scheme(options))]
    if options.method == "awq":
        return [AWQModifier(duo_scaling="both"), QuantizationModifier(**scheme(options))]
    return [QuantizationModifier(**scheme(options))]


def batches(path: str, size: int) -> DataLoader[Any]:
    """All rows in their order, `size` at a time."""
    rows = load_file(path)["input_ids"]
    batch = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in rows.split(size)]
    return DataLoader(batch, batch_size=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--method", choices=("rtn", "gptq", "awq"), required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument(
        "--observer", help="memoryless_mse, imatrix_mse, …; its own default if none"
    )
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    allow_awq_without_accelerator()
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=options.dtype)
    rows = load_file(options.tokens)["input_ids"]
    oneshot(
        model=model,
        tokenizer=AutoTokenizer.from_pretrained(options.model),
        dataset=batches(options.tokens, options.batch),
        recipe=recipe(options),
        num_calibration_samples=len(rows),
        max_seq_length=rows.shape[1],
    )
    model.save_pretrained(options.out, save_compressed=True)
    AutoTokenizer.from_pretrained(options.model).save_pretrained(options.out)


if __name__ == "__main__":
    main()
