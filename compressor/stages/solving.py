"""How matrices that see one input are rounded: the glue between options and `numerics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.gptq import HessianFactor, factorize, gptq
from compressor.numerics.grid import Search, fit_grid
from compressor.numerics.hessian import shrink
from compressor.numerics.propagation import propagated_target
from compressor.numerics.rtn import rtn
from compressor.stages.rounding import Moments, Rounded, Solve
from compressor.types import QTensor, WeightScheme

if TYPE_CHECKING:
    from compressor.stages.quantize_gptq import QuantizeGptq

_UNREACHED = "no calibration token reached it"


def nearest(search: Search) -> Solve:
    """Round to nearest. An input that no token reached has no importance: `mse` stands in."""

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        moments: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        blind = search == "imatrix" and moments is None
        importance = None if moments is None else moments.hessian.diagonal()
        used: Search = "mse" if blind else search
        fallback = (_UNREACHED, "its grid ignores importance") if blind else None

        def rounded(stacked: Tensor, scheme: WeightScheme) -> QTensor:
            return rtn(stacked, scheme, search=used, importance=importance, scale_dtype=dtype)

        return [Rounded(qtensor, fallback) for qtensor in _stacked(weights, schemes, rounded)]

    return solve


def compensated(options: QuantizeGptq) -> Solve:
    """GPTQ: one factorisation for all matrices of an input, their rows solved together."""

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        moments: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        if moments is None:
            simple = nearest("mse")(weights, schemes, None, dtype)
            return [Rounded(r.qtensor, (_UNREACHED, "rounded to nearest")) for r in simple]
        hessian = shrink(moments.hessian, options.shrinkage)
        factor = factorize(hessian, damping=options.damping, act_order=options.act_order)
        if factor.failed and options.on_failure == "stop":
            raise NumericalError("a Hessian is not positive definite even with full damping")
        targets = list(weights)
        if moments.drift is not None:
            drift = moments.drift * (1 - options.shrinkage)
            target = propagated_target(torch.cat(targets), factor, drift, share=options.propagate)
            targets = list(torch.split(target, [len(weight) for weight in weights]))
        fallback = _fallback(factor, options.damping)

        def solved(stacked: Tensor, scheme: WeightScheme) -> QTensor:
            return _solve_rows(stacked, scheme, factor, options, dtype)

        return [
            Rounded(qtensor, fallback, target)
            for qtensor, target in zip(_stacked(targets, schemes, solved), targets, strict=True)
        ]

    return solve


def _stacked(
    weights: Sequence[Tensor],
    schemes: Sequence[WeightScheme],
    rounded: Callable[[Tensor, WeightScheme], QTensor],
) -> list[QTensor]:
    """Neighbours of one scheme rounded as one matrix, and taken apart again.

    Rows do not interact, so one solve serves all; and what an engine fuses (q, k and v, gate and
    up) gets one divisor, where scales have one.
    """
    found: list[QTensor] = []
    for scheme, pairs in groupby(zip(schemes, weights, strict=True), key=lambda pair: pair[0]):
        members = [weight for _, weight in pairs]
        together = rounded(torch.cat(members), scheme)
        ends = accumulate(len(weight) for weight in members)
        found += [together.rows(start, end) for start, end in pairwise([0, *ends])]
    return found


def _solve_rows(
    stacked: Tensor,
    scheme: WeightScheme,
    factor: HessianFactor,
    options: QuantizeGptq,
    dtype: torch.dtype,
) -> QTensor:
    importance = factor.curvature() if options.grid == "obs" else factor.hessian.diagonal()
    search: Search = "imatrix" if options.grid == "obs" else options.grid
    grid = fit_grid(stacked, scheme, search=search, importance=importance, scale_dtype=dtype)
    outcome = gptq(
        stacked, factor, scheme, grid, sweeps=options.sweeps, block_size=options.block_size
    )
    return outcome.quantized


def _fallback(factor: HessianFactor, damping: float) -> tuple[str, str] | None:
    if factor.failed:
        return "its Hessian is not positive definite even with full damping", "rounded to nearest"
    if factor.attempts > 1:
        return (
            f"its Hessian is not positive definite with damping {damping:g}",
            f"damping raised to {factor.damping_used:g}",
        )
    return None
