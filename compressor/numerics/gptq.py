"""GPTQ: round column by column and let the columns still open make up for the error.

Frantar et al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers", 2022, algorithm 1, with static groups: grids are fitted to the original matrix, so
columns may be visited in any order while every group stays where the file format wants it.

Columns of H that are zero ("dead": the input never fired) exchange no error with the others, so
they come out rounded to nearest. The reference code zeroes them instead; that saves no bit and
loses the weight for inputs which the calibration text happened to miss.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.columns import (
    GridColumns,
    add_columns_,
    at,
    columns_first,
    columns_last,
    in_order,
)
from compressor.numerics.descent import coordinate_descent
from compressor.numerics.grid import Grid, round_to_grid
from compressor.numerics.hessian import full_precision, row_losses
from compressor.types import QTensor, WeightScheme

_DAMPING_FACTOR = 10.0
_SMALLEST_RETRY = 1e-4
_LARGEST_DAMPING = 1.0
_PANEL = 256  # columns of an inverse found at a time


@dataclass(frozen=True)
class HessianFactor:
    """What GPTQ needs of the inputs; shared by every matrix that reads them (q, k and v).

    `*` is the size of a batch of inputs of one width, or nothing.

    Attributes:
        hessian: [*, in, in] as measured, undamped, in the original order.
        upper: U [*, in, in] with UᵀU = (H + λI)⁻¹ in visiting order; the identity if `failed`.
        permutation: int64 [*, in]; entry i is the original column visited i-th.
        dead: bool [*, in], original order: inputs that never fired.
        damping_used: λ as a share of mean diag(H), fp64 [*].
        attempts: factorisations tried, int64 [*].
        failed: bool [*]; no damping made H positive definite. The identity then stands in for U,
            and GPTQ degenerates to rounding to nearest: the caller has a fallback to report.
    """

    hessian: Tensor
    upper: Tensor
    permutation: Tensor
    dead: Tensor
    damping_used: Tensor
    attempts: Tensor
    failed: Tensor

    def curvature(self) -> Tensor:
        """1 / [(H + λI)⁻¹]_jj, fp32 [*, in]; 0 for inputs that never fired, all 1 if `failed`.

        What a unit error in one column costs once all others have made up for it, where diag(H)
        is what it costs alone (Hassibi & Stork, "Optimal Brain Surgeon", 1993, eq. 5).
        """
        visited = self.upper.square().sum(-2)
        inverse = torch.empty_like(visited).scatter_(-1, self.permutation, visited)
        return torch.where(self.dead, 0.0, 1 / inverse)


@dataclass(frozen=True)
class Asymmetry:
    """What GPTAQ needs besides: inputs of the rounded model differ from the original's.

    Attributes:
        pull: P [*, in, in] in visiting order, strictly upper (`propagation.forward_pull`).
        target: fp32 [*, out, in], what minimises the output error without a grid
            (`propagation.propagated_target` with the same share).
    """

    pull: Tensor
    target: Tensor


@dataclass(frozen=True)
class GPTQOutcome:
    """Codes, and what became of each row.

    Attributes:
        quantized: the codes.
        nearest_rows: rows where plain rounding had the lower error d H dᵀ and was kept.
        row_loss: d H dᵀ, fp32 [*, out].
        nearest_row_loss: the same for rounding to nearest on the same grid.
    """

    quantized: QTensor
    nearest_rows: int
    row_loss: Tensor
    nearest_row_loss: Tensor


def factorize(hessian: Tensor, *, damping: float = 0.01, act_order: bool = True) -> HessianFactor:
    """Factor the inverse Hessian, or each of a batch, in fp64.

    When H + λI is not positive definite, λ grows tenfold (from 1e-4 at least) up to mean diag(H).

    Args:
        hessian: H [*, in, in], symmetric; `*` is a batch or nothing.
        damping: λ as a share of mean diag(H) over the inputs that fired; at least 0.
        act_order: visit columns by descending diag(H), while most of the others are still open.

    Raises:
        NumericalError: H holds NaN or infinity.
        ValueError: H is not square or the damping is negative.
    """
    _check_hessian(hessian, damping)
    diagonal = hessian.diagonal(dim1=-2, dim2=-1)
    dead = diagonal <= 0
    order = torch.arange(diagonal.shape[-1], device=hessian.device).expand_as(diagonal)
    if act_order:
        order = torch.argsort(diagonal, descending=True, stable=True)
    share = torch.full_like(diagonal[..., 0], damping, dtype=torch.float64)
    attempts = torch.ones_like(share, dtype=torch.int64)
    upper, failed = _inverse_factor(_damped(hessian, dead, share), order)
    for place in map(tuple, failed.nonzero().tolist()):  # so few that they go one by one
        for raised in _damping_steps(damping)[1:]:
            share[place] = raised
            attempts[place] += 1
            again = _damped(hessian[place], dead[place], share[place])
            upper[place], failed[place] = _inverse_factor(again, order[place])
            if not failed[place]:
                break
    return HessianFactor(hessian, upper, order, dead, share, attempts, failed)


def gptq(
    weight: Tensor,
    factor: HessianFactor,
    scheme: WeightScheme,
    grid: Grid,
    *,
    sweeps: int = 0,
    block_size: int = 32,
    asymmetry: Asymmetry | None = None,
) -> GPTQOutcome:
    """Codes that keep the layer's output, rather than its weights, close.

    GPTQ is greedy, and now and then ends above plain rounding. The error is a sum over rows, so
    each row keeps whichever of the two has the lower d H dᵀ: never worse than rounding to nearest
    on the same grid, row by row.

    Args:
        weight: [*, out, in], the target; `*` is a batch or nothing. It may differ from the matrix
            the grid was fitted to, for example by errors of earlier layers that it should make up
            for.
        factor: of this layer's inputs.
        scheme: the grid's scheme.
        grid: [*, out, groups], in the original column order.
        sweeps: rounds of coordinate descent after GPTQ, each about as long as GPTQ itself. Two
            of them lowered the held-out layer error of SmolLM2-135M by 4% at 4 bits, 5% at 3 and
            8% at 2.
        block_size: columns solved one by one between two matrix products. Changes speed only.
        asymmetry: lets open columns make up for drifted inputs as well; losses and sweeps then
            are about its target instead of the weight.

    Raises:
        NumericalError: the weight holds NaN or infinity.
    """
    nearest = round_to_grid(weight, grid, scheme)
    target = weight.float() if asymmetry is None else asymmetry.target
    pull = None if asymmetry is None else asymmetry.pull
    nearest_loss = row_losses(target - nearest.dequantize().float(), factor.hessian)
    columns = GridColumns(grid, scheme, factor.permutation)
    with full_precision():
        codes = _Solver(weight.float(), factor, columns, block_size, pull).codes()
    solved = grid.tensor(codes, scheme)
    if sweeps:
        solved = coordinate_descent(
            target, solved, damped(factor, torch.float32), order=factor.permutation, sweeps=sweeps
        )
    return _best_rows(solved, nearest, nearest_loss, target, factor)


def _best_rows(
    solved: QTensor, nearest: QTensor, nearest_loss: Tensor, target: Tensor, factor: HessianFactor
) -> GPTQOutcome:
    """Row by row, the solution unless rounding to nearest has the lower error or H is no guide."""
    loss = row_losses(target - solved.dequantize().float(), factor.hessian)
    keep = (nearest_loss < loss) | factor.failed.unsqueeze(-1)
    codes = torch.where(keep.unsqueeze(-1), nearest.codes, solved.codes)
    best = replace(solved, codes=codes)
    row_loss = torch.where(keep, nearest_loss, loss)
    return GPTQOutcome(best, int(keep.sum()), row_loss, nearest_loss)


def damped(factor: HessianFactor, dtype: torch.dtype = torch.float64) -> Tensor:
    """H + λI with dead inputs cut loose, in original order, a new tensor."""
    return _damped(factor.hessian, factor.dead, factor.damping_used, dtype)


def _check_hessian(hessian: Tensor, damping: float) -> None:
    if hessian.ndim not in (2, 3) or hessian.shape[-2] != hessian.shape[-1]:
        raise ValueError(f"a Hessian is square, not {list(hessian.shape)}")
    if damping < 0:
        raise ValueError(f"damping is a share of the mean diagonal, at least 0, not {damping}")
    if not all(extreme.isfinite() for extreme in hessian.aminmax()):  # one pass, no mask
        raise NumericalError("the Hessian of a layer holds NaN or infinity")


def _damped(
    hessian: Tensor, dead: Tensor, share: Tensor, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A copy of H with dead inputs cut loose, and `share` of mean diag(H) of the others added.

    Dead inputs get that mean as their diagonal (the reference has 1), so that scaling all inputs
    changes nothing.
    """
    working = hessian.to(dtype, copy=True)
    diagonal = working.diagonal(dim1=-2, dim2=-1)
    alive = (~dead).sum(-1)
    mean = torch.where(dead, 0, diagonal.double()).sum(-1) / alive
    mean = torch.where(alive > 0, mean, 1.0)
    if dead.any():
        working.masked_fill_(dead.unsqueeze(-1) | dead.unsqueeze(-2), 0)
        diagonal.copy_(torch.where(dead, mean.unsqueeze(-1), diagonal))
    diagonal.add_((share * mean).unsqueeze(-1).to(dtype))
    return working


def _damping_steps(damping: float) -> list[float]:
    steps = [damping]
    while steps[-1] < _LARGEST_DAMPING:
        steps.append(min(max(steps[-1] * _DAMPING_FACTOR, _SMALLEST_RETRY), _LARGEST_DAMPING))
    return steps


def _inverse_factor(damped: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Upper U with UᵀU = H⁻¹, fp32, and whether H is not positive definite; `damped` is used up.

    Factoring H from its last row up gives H = R Rᵀ with R upper triangular, hence U = R⁻¹. One
    factorisation and a triangular solve; the usual detour over H⁻¹ is slower and, close to
    singular, refuses matrices that this one still factors. With rows and columns reversed, R is
    the ordinary lower factor.

    Args:
        damped: H [*, in, in], fp64, in the original order.
        order: in which its columns are visited [*, in].

    Returns:
        U [*, in, in], the identity where there is none, and bool [*].
    """
    damped = in_order(damped, order.flip(-1))  # each name lets go of a matrix that is done with
    lower, info = torch.linalg.cholesky_ex(damped)
    upper = _inverse_lower(lower, out=damped.zero_()).float().flip(-2, -1)
    extremes = upper.amin((-2, -1)), upper.amax((-2, -1))
    failed = (info != 0) | ~torch.stack(extremes).isfinite().all(0)
    if failed.any():
        identity = torch.eye(upper.shape[-1], device=upper.device)
        upper = torch.where(failed[..., None, None], identity, upper)
    return upper, failed


def _inverse_lower(lower: Tensor, out: Tensor) -> Tensor:
    """L⁻¹ of a lower triangular L [*, in, in], into `out`, which holds zeros.

    Panel by panel of its columns, which are zero above the diagonal: a third of the operations.
    """
    for start in range(0, lower.shape[-1], _PANEL):
        panel = out[..., start:, start : start + _PANEL]
        panel.diagonal(dim1=-2, dim2=-1).fill_(1)
        rest = lower[..., start:, start:]
        panel.copy_(torch.linalg.solve_triangular(rest, panel, upper=False))
    return out


class _Solver:
    """The column loop on a transposed, permuted copy, so that a column is one contiguous row.

    Column j owes Σ_i (w_i - ŵ_i) U_ij / U_ii for the columns i before it; the division is done
    once, on U, and makes what is owed negative. A solved column's place in `open` is taken by its
    error w_i - ŵ_i. With a pull P it is owed Σ_i w_i P_ij, w_i being what column i had become when
    it was rounded (`met`).
    """

    def __init__(
        self,
        weight: Tensor,
        factor: HessianFactor,
        columns: GridColumns,
        leaf: int,
        pull: Tensor | None,
    ):
        self.order = factor.permutation
        self.open = columns_first(weight).contiguous()[at(self.order)]
        diagonal = factor.upper.diagonal(dim1=-2, dim2=-1)
        self.shares = factor.upper / -diagonal.unsqueeze(-1)
        self.columns = columns
        self.leaf = leaf
        self.pull = pull
        self.met = None if pull is None else torch.empty_like(self.open)
        self.solved = torch.empty_like(self.open, dtype=torch.int8)

    def codes(self) -> Tensor:
        """int8 [*, out, in] in the original order."""
        self._solve(0, len(self.open))
        return columns_last(self.solved)

    def _solve(self, start: int, stop: int) -> None:
        """Halve until a leaf: most of the work is then in large matrix products."""
        if stop - start <= self.leaf:
            self._solve_leaf(start, stop)
            return
        leaves = -(-(stop - start) // self.leaf)
        middle = start + self.leaf * (leaves // 2)
        self._solve(start, middle)
        rest = self.open[middle:stop]
        later = slice(start, middle), slice(middle, stop)
        add_columns_(rest, self.shares[..., *later].mT, self.open[start:middle])
        if self.pull is not None and self.met is not None:
            add_columns_(rest, self.pull[..., *later].mT, self.met[start:middle])
        self._solve(middle, stop)

    def _solve_leaf(self, start: int, stop: int) -> None:
        """Round columns one by one, each after its debts within the leaf."""
        rows = self.open[start:stop]
        debts = self.shares[..., start:stop, start:stop].mT.contiguous()
        leaf = self.columns.leaf(start, stop)
        if self.pull is None or self.met is None:
            leaf.settle(rows, debts)
        else:
            drift = self.pull[..., start:stop, start:stop].mT.contiguous()
            leaf.settle(rows, debts, drift=drift, met=self.met[start:stop])
        self.solved[at(self.order[..., start:stop])] = leaf.codes()
