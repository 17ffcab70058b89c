#!/usr/bin/env python3
"""How far is GPTQ, end to end, from the time its matrix products alone would take?

    python benchmarks/gptq_floor.py [--model builtin:tiny] [--recipe w4-gptq] [--set KEY=VALUE]
                                    [--blocks N] [--threads N]

The floor counts what no implementation that propagates errors can leave out: the calibration
tokens once through the blocks of the model and once through those of its parent (2 operations
for each weight and token; attention itself, norms and activation functions are not counted), and
one Hessian for each input (2·tokens·in²). Divided by the rate of an fp32 matrix product on this
machine, measured before and after the run in the same process, that is the floor in seconds. The
second moments between the two models, the factorisations and the solves are no part of it.

Wall time is that of the stage, from opening the checkpoint to the last shard on disk; with
`--blocks N`, of the first N blocks. The peak is the largest resident set of the whole process.
"""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

from compressor.calibration import build_batches
from compressor.machine import activation_budget, prefer_huge_pages
from compressor.model.architecture import Architecture
from compressor.model.load import load_tokenizer, read_config, resolve
from compressor.model.quiet import quiet
from compressor.progress import SilentObserver
from compressor.recipe import load_recipe
from compressor.stages.context import StageContext
from compressor.types import BlockRecord

SIZE = 2048


class Enough(Exception):
    """As many blocks as were asked for are done."""


def rate(repeats: int = 10) -> tuple[float, float]:
    """fp32 products of 2048³ in fp32 and through bf16 units, operations per second, best of ten."""
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    found = []
    for precision in ("highest", "medium"):
        torch.set_float32_matmul_precision(precision)
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            left @ right
            times.append(time.perf_counter() - began)
        found.append(2 * SIZE**3 / min(times))
    torch.set_float32_matmul_precision("highest")
    return found[0], found[1]


def floor(architecture: Architecture, tokens: int, blocks: int) -> float:
    """Operations of two forwards through the first blocks, and of their Hessians."""
    total = 0.0
    for index in range(blocks):
        members = architecture.groups(index).values()
        total += 4.0 * tokens * sum(matrix.parameters for group in members for matrix in group)
        total += sum(2.0 * tokens * group[0].shape[1] ** 2 for group in members)
    return total


def limit(blocks: int) -> Callable[[BlockRecord], None]:
    """Stop when a number of blocks are done."""
    done: list[int] = []

    def block_done(record: BlockRecord) -> None:
        done.append(record.block)
        if len(done) == blocks:
            raise Enough

    return block_done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--recipe", default="w4-gptq")
    parser.add_argument("--set", action="append", default=[], help="such as stages.0.sweeps=0")
    parser.add_argument("--blocks", type=int, help="only so many")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    prefer_huge_pages()
    torch.set_num_threads(options.threads)
    path = resolve(options.model).path
    recipe = load_recipe(options.recipe, overrides=options.set)
    stage = recipe.stages[-1]
    architecture = Architecture.from_config(read_config(path))
    blocks = min(options.blocks or architecture.layers, architecture.layers)
    assert recipe.calibration is not None, "the recipe calibrates nothing"
    with quiet(), tempfile.TemporaryDirectory() as folder:
        calibration = build_batches(recipe.calibration, load_tokenizer(path))
        before, load = rate(), os.getloadavg()[0]
        context = StageContext(
            folder=Path(folder) / "stage",
            scratch=Path(folder) / "scratch",
            device=torch.device("cpu"),
            dtype=torch.float32,
            activation_budget=activation_budget(),
            finished=(),
            block_done=limit(blocks if options.blocks else 0),
            observer=SilentObserver(),
        )
        began, used = time.perf_counter(), time.process_time()
        with suppress(Enough):
            stage.run(path, calibration, context)
        wall, cpu = time.perf_counter() - began, time.process_time() - used
        after = rate()
    tokens = sum(int(batch.mask.sum()) for batch in calibration.batches)
    operations = floor(architecture, tokens, blocks)
    exact, mixed = (max(pair) for pair in zip(before, after, strict=True))
    print(
        f"{options.model}, {stage.method}, {blocks} blocks, {tokens} tokens, "
        f"{options.threads} threads, load {load:.1f} before and {os.getloadavg()[0]:.1f} after\n"
        f"products: fp32 {exact / 1e9:.0f} GFLOP/s, through bf16 units {mixed / 1e9:.0f}\n"
        f"floor: {operations / 1e12:.2f}e12 operations, {operations / exact:.1f} s\n"
        f"wall: {wall:.1f} s = {wall / (operations / exact):.2f} x the floor; "
        f"processor: {cpu:.1f} s\n"
        f"peak resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )


if __name__ == "__main__":
    main()
