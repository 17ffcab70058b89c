"""Round a model with GPTQModel; runs in the environment of that peer, not in ours.

    python gptqmodel_.py MODEL TOKENS OUT --method gptq|gptaq --bits N [--group-size 64] [--mse P]

TOKENS is a safetensors file with `input_ids` int64 [rows, length]. Symmetric groups, head kept.
"""

from __future__ import annotations

import argparse

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization.config import GPTAQConfig
from safetensors.torch import load_file


def rows(path: str) -> list[dict[str, list[int]]]:
    ids = load_file(path)["input_ids"]
    return [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--method", choices=("gptq", "gptaq"), required=True)
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument(
        "--mse", type=float, default=0.0, help="exponent of its range search; 0: none"
    )
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    config = QuantizeConfig(
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        device="cpu",
        mse=options.mse,
        gptaq=GPTAQConfig() if options.method == "gptaq" else None,
    )
    model = GPTQModel.load(options.model, config, dtype=getattr(torch, options.dtype))
    model.quantize(rows(options.tokens), batch_size=options.batch, calibration_sort=None)
    model.save(options.out)


if __name__ == "__main__":
    main()
