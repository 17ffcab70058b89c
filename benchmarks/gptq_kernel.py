"""How far is our GPTQ from the machine's limit, and from the plain column loop?

    python benchmarks/gptq_kernel.py [--threads N] [--block-size 16 32 64]

For each layer shape: seconds for the solve, against (a) the column loop of the paper's reference
code in the same torch, with lazy updates per block of 128, and (b) the time one fp32 matrix
product takes for the same out·in² floating-point operations (the solve's count: a multiplication
and an addition for each pair of columns and each row). Best of five runs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from compressor.numerics.gptq import HessianFactor, factorize, gptq
from compressor.numerics.grid import Grid, fit_grid
from compressor.numerics.hessian import HessianAccumulator
from compressor.types import WeightScheme

SHAPES = ((576, 576), (1536, 576), (576, 1536), (2048, 2048))  # [out, in]
SCHEME = WeightScheme(4, 64, "symmetric")


def best_of(run: Callable[[], object], repeats: int = 5) -> float:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def reference_loop(weight: Tensor, factor: HessianFactor, grid: Grid, block: int = 128) -> Tensor:
    """Algorithm 1 as published: [out, in] layout, one rank-1 update per column."""
    order = factor.permutation
    group = order // (weight.shape[1] // grid.scale.shape[1])
    scale = grid.scale.float()
    work, upper = weight[:, order].clone(), factor.upper
    result = torch.zeros_like(work)
    for start in range(0, work.shape[1], block):
        stop = min(start + block, work.shape[1])
        part = work[:, start:stop].clone()
        errors = torch.zeros_like(part)
        corner = upper[start:stop, start:stop]
        for i in range(stop - start):
            step = scale[:, group[start + i]]
            stored = torch.clamp(torch.round(part[:, i] / step), *SCHEME.code_range) * step
            result[:, start + i] = stored
            error = (part[:, i] - stored) / corner[i, i]
            part[:, i:] -= error.unsqueeze(1).matmul(corner[i, i:].unsqueeze(0))
            errors[:, i] = error
        work[:, stop:] -= errors.matmul(upper[start:stop, stop:])
    return result


def product_seconds(out: int, width: int) -> float:
    """Seconds for out·in² operations as one [in/2, in] × [in, out] product."""
    left, right = torch.randn(width // 2, width), torch.randn(width, out)
    return best_of(lambda: left @ right)


def report(out: int, width: int, block_sizes: list[int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(out, width)
    inputs = torch.randn(2 * width, width) @ torch.randn(width, width)
    accumulator = HessianAccumulator(width)
    collect = best_of(lambda: accumulator.add(inputs))
    hessian = accumulator.matrix()
    factoring = best_of(lambda: factorize(hessian))
    factor = factorize(hessian)
    searching = best_of(lambda: fit_grid(weight, SCHEME, search="mse"))
    grid = fit_grid(weight, SCHEME, search="mse")
    naive = best_of(lambda: reference_loop(weight, factor, grid), repeats=2)
    floor = product_seconds(out, width)
    rate = out * width**2 / floor / 1e9
    print(
        f"{width} -> {out}: product {floor * 1e3:.1f} ms ({rate:.0f} GFLOP/s), factor "
        f"{factoring * 1e3:.0f} ms, mse grid {searching * 1e3:.0f} ms, Hessian of "
        f"{len(inputs)} tokens {collect * 1e3:.0f} ms, reference loop {naive * 1e3:.0f} ms"
    )
    for block in block_sizes:
        ours = best_of(lambda size=block: gptq(weight, factor, SCHEME, grid, block_size=size))
        print(
            f"    block {block:3d}: {ours * 1e3:7.1f} ms = {ours / width * 1e6:5.1f} us/column, "
            f"{naive / ours:.1f}x the reference's speed, {ours / floor:.1f}x the product"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--block-size", type=int, nargs="+", default=[32])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"torch {torch.__version__}, {options.threads} thread(s), fp32, bf16 scales")
    for out, width in SHAPES:
        report(out, width, options.block_size)


if __name__ == "__main__":
    main()
