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

Two ratios to the floor are printed:

- wall: the stage's seconds by the clock, from opening the checkpoint to the last shard on disk
  (with `--blocks N`, of the first N blocks), against the floor at the rate of all `--threads`
  together. It is what a user waits for, and says something on an idle machine only.
- processor: the stage's seconds of processor time, user and system of all threads, against the
  floor at the rate of one thread, which is measured in processor time as well. Time that other
  processes take counts in neither, so that it holds on a loaded machine; crowded caches and memory
  still slow both. It is blind to threads that idle: steps that only one thread can take raise the
  wall ratio above it, and threads that spin while they wait raise it above the wall ratio
  (`GOMP_SPINCOUNT=1000`, which `compress` sets for itself, lets them sleep soon).

The first block brings the set-up of both walks; more blocks spread it. The peak is the largest
resident set of the whole process.
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
from typing import NamedTuple

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


class Rates(NamedTuple):
    """Products of 2048³ in fp32 storage, operations per second, each the best of ten.

    Attributes:
        exact: in fp32, by the clock, all threads.
        mixed: through bf16 units, by the clock, all threads.
        single: in fp32, per second of processor time, one thread.
    """

    exact: float
    mixed: float
    single: float

    @classmethod
    def measured(cls) -> Rates:
        """On this machine, now."""
        threads = torch.get_num_threads()
        exact = rate("highest", time.perf_counter)
        mixed = rate("medium", time.perf_counter)
        torch.set_num_threads(1)
        single = rate("highest", time.thread_time)
        torch.set_num_threads(threads)
        return cls(exact, mixed, single)


def rate(precision: str, clock: Callable[[], float], repeats: int = 10) -> float:
    """Operations per second of the clock, of the best product."""
    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    torch.set_float32_matmul_precision(precision)
    times = []
    for _ in range(repeats):
        began = clock()
        left @ right
        times.append(clock() - began)
    torch.set_float32_matmul_precision("highest")
    return 2 * SIZE**3 / min(times)


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
        before, load = Rates.measured(), os.getloadavg()[0]
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
        after = Rates.measured()
    tokens = sum(int(batch.mask.sum()) for batch in calibration.batches)
    operations = floor(architecture, tokens, blocks)
    best = Rates(*map(max, before, after))
    print(
        f"{options.model}, {stage.method}, {blocks} blocks, {tokens} tokens, "
        f"{options.threads} threads, load {load:.1f} before and {os.getloadavg()[0]:.1f} after\n"
        f"products: fp32 {best.exact / 1e9:.0f} GFLOP/s, through bf16 units "
        f"{best.mixed / 1e9:.0f}, fp32 on one core {best.single / 1e9:.0f}\n"
        f"floor: {operations / 1e12:.2f}e12 operations, {operations / best.exact:.1f} s, "
        f"{operations / best.single:.1f} core-seconds\n"
        f"wall: {wall:.1f} s = {wall * best.exact / operations:.2f} x the floor\n"
        f"processor: {cpu:.1f} s = {cpu * best.single / operations:.2f} x the floor\n"
        f"peak resident set: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024:.0f} MiB"
    )


if __name__ == "__main__":
    main()
