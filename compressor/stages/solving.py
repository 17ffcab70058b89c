"""How matrices that see one input are rounded: the glue between options and `numerics`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, groupby, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.gptq import Asymmetry, HessianFactor, factorize, gptq
from compressor.numerics.grid import Grid, Search, fit_grid
from compressor.numerics.hessian import shrink
from compressor.numerics.hqq import HalfQuadratic, hqq
from compressor.numerics.propagation import forward_pull, propagated_target
from compressor.numerics.rtn import rtn
from compressor.stages.grids import READ_TEXT, CompensatedSearch
from compressor.stages.moments import Moments
from compressor.stages.rounding import Rounded, Solve
from compressor.types import QTensor, WeightScheme

if TYPE_CHECKING:
    from compressor.stages.quantize_gptq import QuantizeGptq
    from compressor.stages.quantize_hqq import QuantizeHqq

_UNREACHED = "no calibration token reached it"
# Grids in which an error counts by what is left of it once other weights make up for it.
_BY_CURVATURE = ("obs", "neuqi")


def nearest(search: Search) -> Solve:
    """Round to nearest. An input that no token reached has no importance: `mse` stands in."""

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        moments: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        blind = search in READ_TEXT and moments is None
        hessian = None if moments is None else moments.hessian
        importance = None if hessian is None else hessian.diagonal(dim1=-2, dim2=-1)
        used: Search = "mse" if blind else search
        fallbacks = {0: (_UNREACHED, "its grid ignores importance")} if blind else {}

        def rounded(stacked: Tensor, scheme: WeightScheme, _: slice) -> QTensor:
            return rtn(
                stacked,
                scheme,
                search=used,
                importance=importance,
                hessian=hessian,
                scale_dtype=dtype,
            )

        return [Rounded(qtensor, fallbacks) for qtensor in _stacked(weights, schemes, rounded)]

    return solve


def half_quadratic(options: QuantizeHqq) -> Solve:
    """HQQ, which looks at weights only."""
    settings = HalfQuadratic(options.exponent, options.beta, options.growth, options.iterations)

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        _: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        pairs = zip(weights, schemes, strict=True)
        return [
            Rounded(hqq(weight, scheme, settings, start=options.grid, scale_dtype=dtype))
            for weight, scheme in pairs
        ]

    return solve


def compensated(options: QuantizeGptq) -> Solve:
    """GPTQ: one factorisation for all matrices of an input, their rows solved together.

    Of a batch of inputs, every step is taken for all of them at once.
    """

    def solve(
        weights: Sequence[Tensor],
        schemes: Sequence[WeightScheme],
        moments: Moments | None,
        dtype: torch.dtype,
    ) -> list[Rounded]:
        if moments is None:
            simple = nearest("mse")(weights, schemes, None, dtype)
            return [Rounded(r.qtensor, {0: (_UNREACHED, "rounded to nearest")}) for r in simple]
        hessian = shrink(moments.hessian, options.shrinkage)
        factor = factorize(hessian, damping=options.damping, act_order=options.act_order)
        if options.on_failure == "stop" and factor.failed.any():
            raise NumericalError("a Hessian is not positive definite even with full damping")
        drift = moments.drift
        if drift is not None and options.shrinkage:
            drift = drift * (1 - options.shrinkage)
        targets = list(weights)
        if drift is not None:
            share = options.gptaq or options.propagate
            target = propagated_target(torch.cat(targets), factor, drift, share=share)
            targets = list(torch.split(target, [len(weight) for weight in weights]))
        fallbacks = _fallbacks(factor, options.damping)
        if options.gptaq and drift is not None:
            pull = forward_pull(factor, drift, share=options.gptaq)
            solved = _asymmetric(torch.cat(targets), pull, factor, options, dtype)
            codes = _stacked(weights, schemes, solved)
        else:
            codes = _stacked(targets, schemes, _symmetric(factor, options, dtype))
        return [
            Rounded(qtensor, fallbacks, target)
            for qtensor, target in zip(codes, targets, strict=True)
        ]

    return solve


_Round = Callable[[Tensor, WeightScheme, slice], QTensor]
"""Called with a few matrices stacked, their scheme, and which rows of all matrices they are."""


def _symmetric(factor: HessianFactor, options: QuantizeGptq, dtype: torch.dtype) -> _Round:
    """Codes close to the matrix itself, which may be a propagating target."""
    return lambda stacked, scheme, _: _solve_rows(stacked, scheme, factor, options, dtype)


def _asymmetric(
    target: Tensor,
    pull: Tensor,
    factor: HessianFactor,
    options: QuantizeGptq,
    dtype: torch.dtype,
) -> _Round:
    """GPTAQ: from the weights, while the solve goes on, towards the target of all matrices."""

    def solved(stacked: Tensor, scheme: WeightScheme, rows: slice) -> QTensor:
        asymmetry = Asymmetry(pull, target[rows])
        return _solve_rows(stacked, scheme, factor, options, dtype, asymmetry)

    return solved


def _stacked(
    weights: Sequence[Tensor],
    schemes: Sequence[WeightScheme],
    rounded: _Round,
) -> list[QTensor]:
    """Neighbours of one scheme rounded as one matrix, and taken apart again.

    Rows do not interact, so one solve serves all; and what an engine fuses (q, k and v, gate and
    up) gets one divisor, where scales have one.
    """
    found: list[QTensor] = []
    row = 0
    for scheme, pairs in groupby(zip(schemes, weights, strict=True), key=lambda pair: pair[0]):
        parts = [weight for _, weight in pairs]
        ends = [0, *accumulate(weight.shape[-2] for weight in parts)]
        together = rounded(torch.cat(parts, -2), scheme, slice(row, row + ends[-1]))
        found += [together.rows(start, end) for start, end in pairwise(ends)]
        row += ends[-1]
    return found


def _solve_rows(
    stacked: Tensor,
    scheme: WeightScheme,
    factor: HessianFactor,
    options: QuantizeGptq,
    dtype: torch.dtype,
    asymmetry: Asymmetry | None = None,
) -> QTensor:
    outcome = gptq(
        stacked,
        factor,
        scheme,
        _fitted(stacked, scheme, factor, options.grid, dtype),
        sweeps=options.sweeps,
        block_size=options.block_size,
        asymmetry=asymmetry,
    )
    return outcome.quantized


def _fitted(
    stacked: Tensor,
    scheme: WeightScheme,
    factor: HessianFactor,
    grid: CompensatedSearch,
    dtype: torch.dtype,
) -> Grid:
    """The grid of matrices that are compensated. `obs` is the search of `imatrix` by curvature."""
    search: Search = "imatrix" if grid == "obs" else grid
    curved = grid in _BY_CURVATURE
    return fit_grid(
        stacked,
        scheme,
        search=search,
        importance=factor.curvature() if curved else factor.hessian.diagonal(dim1=-2, dim2=-1),
        hessian=factor.hessian,
        scale_dtype=dtype,
    )


def _fallbacks(factor: HessianFactor, damping: float) -> dict[int, tuple[str, str]]:
    """(reason, action) of every input that was not done as asked, by its place in the batch."""
    found = {}
    facts = (factor.failed, factor.attempts, factor.damping_used)
    for i, (failed, attempts, used) in enumerate(zip(*map(_listed, facts), strict=True)):
        if failed:
            reason = "its Hessian is not positive definite even with full damping"
            found[i] = reason, "rounded to nearest"
        elif attempts > 1:
            reason = f"its Hessian is not positive definite with damping {damping:g}"
            found[i] = reason, f"damping raised to {used:g}"
    return found


def _listed(facts: Tensor) -> list[float]:
    return facts.reshape(-1).tolist()
