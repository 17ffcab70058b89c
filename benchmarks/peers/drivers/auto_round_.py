"""Round a model with auto-round; runs in the environment of that peer, not in ours.

    python auto_round_.py MODEL TOKENS OUT --bits N [--iterations 200] [--group-size 64]
        [--extension]

TOKENS is a safetensors file with `input_ids` int64 [rows, length]. Symmetric groups, head kept.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import load_file


def rows(path: str, size: int) -> list[dict[str, torch.Tensor]]:
    """All rows in their order; auto-round wants a mask that is not all ones, so the last is off."""
    ids = load_file(path)["input_ids"]
    mask = torch.ones_like(ids)
    mask[:, -1] = 0
    parts = zip(ids.split(size), mask.split(size), strict=True)
    return [{"input_ids": part, "attention_mask": on} for part, on in parts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("tokens")
    parser.add_argument("out")
    parser.add_argument("--bits", type=int, required=True)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=200)
    parser.add_argument("--extension", action="store_true", help="its algorithm extension")
    parser.add_argument("--batch", type=int, default=8)
    options = parser.parse_args()
    shape = load_file(options.tokens)["input_ids"].shape
    AutoRound(
        options.model,
        bits=options.bits,
        group_size=options.group_size,
        sym=True,
        dataset=rows(options.tokens, options.batch),
        nsamples=shape[0],
        seqlen=shape[1],
        batch_size=options.batch,
        iters=options.iterations,
        device_map="cpu",
        enable_alg_ext=options.extension,
    ).quantize_and_save(options.out, format="auto_round")
    for folder in Path(options.out).iterdir():  # it makes one that is named after model and scheme
        shutil.copytree(folder, options.out, dirs_exist_ok=True)
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
