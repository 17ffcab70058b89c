#!/usr/bin/env python3
"""What a recipe takes on a Llama of full size: minutes, memory of the process and of the GPU.

    python benchmarks/large_llama.py [--shape Llama-3.1-8B] [--recipe w4-gptq] [--set KEY=VALUE]
                                     [--out out/large] [--results FILE]

Time and memory do not depend on what the weights are, so that they are random, and nothing has to
be downloaded; what the report says of accuracy means nothing. Groups are of 128, and one document
of each kind of text is scored, so that the stages are what takes time. The model is made once,
below `--out`, shard by shard; there the run goes on where it was stopped.

Published beside it: llm-compressor's GPTQ of Llama-3-8B to 4 bits, about 12 minutes and 6 GiB of
GPU memory on an A100 (its own documentation; other text, and no evaluation).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from draft_sizes import SHAPES, architecture
from torch import Tensor

from compressor.formats.shards import CheckpointWriter, shard_name
from compressor.model.load import resolve

SETTINGS = ("stages.0.group_size=128", "evaluate.suite=quick", "evaluate.documents=1")


def random_model(name: str, folder: Path) -> Path:
    """A checkpoint of one of `SHAPES`, with the tokenizer of the built-in model."""
    shape, writer = architecture(name), CheckpointWriter(folder)
    shards: dict[str, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for tensor, size in shape.tensors():
        before, _, within = tensor.partition(f"{shape.blocks_path}.")
        part = "outside" if before else int(within.partition(".")[0])
        shards[shard_name(part)][tensor] = size
    for shard, sizes in shards.items():
        if not writer.has_shard(shard):
            writer.write_shard(shard, {name: random(size) for name, size in sizes.items()})
    if not writer.finished:
        writer.finish(shape.config, resolve("builtin:tiny").path, shape.parameters)
    return folder


def random(size: tuple[int, ...]) -> Tensor:
    """A matrix as models begin their training with, or the ones of a norm."""
    return (torch.randn(size) * 0.02 if len(size) > 1 else torch.ones(size)).bfloat16()


def row(label: str, report: dict[str, Any]) -> str:
    """A line of the table."""
    stages = [variant["stage"] for variant in report["variants"] if variant["stage"]]
    seconds = sum(stage["seconds"] for stage in stages)
    resident = max(stage["peak_bytes"] for stage in stages) / 2**30
    device = max(stage["device_peak_bytes"] for stage in stages) / 2**30
    cells = [label, f"{seconds / 60:.1f}", f"{report['run']['seconds'] / 60:.1f}"]
    cells += [f"{resident:.1f}", f"{device:.1f}" if device else "–", report["env"]["device"]]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="Llama-3.1-8B")
    parser.add_argument("--recipe", default="w4-gptq")
    parser.add_argument("--set", action="append", default=[], help="KEY=VALUE, after its own")
    parser.add_argument("--out", type=Path, default=Path("out/large"))
    parser.add_argument("--results", type=Path, help="file for the table")
    options = parser.parse_args()
    model = random_model(options.shape, options.out / options.shape)
    run = options.out / f"{options.shape}-{options.recipe}"
    settings = [f"--set={entry}" for entry in (*SETTINGS, *options.set)]
    command = [sys.executable, "-m", "compressor", options.recipe, str(model), "-o", str(run)]
    subprocess.run([*command, *settings], check=True)
    table = [
        "| | stages, min | whole run, min | resident GiB | GPU GiB | device |",
        "|---|---|---|---|---|---|",
        row(f"{options.shape}, {options.recipe}", json.loads((run / "report.json").read_text())),
    ]
    text = "\n".join(table) + "\n"
    print(text)
    if options.results:
        options.results.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
