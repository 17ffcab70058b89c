"""Which units of a layer's input can go, and how the others make up for them.

W [out, in] reads inputs X [in, N] with H = (2/N) X Xᵀ; a unit is a run of neighbouring columns (a
channel, a head). Removing the columns S from the target T and refitting those that stay, K, costs

    min over V of ½ tr((T - V) H (T - V)ᵀ)  =  ½ tr(T_S [(H⁻¹)_SS]⁻¹ T_Sᵀ)
    V_K = T_K + T_S H_SK (H_KK)⁻¹

(Hassibi & Stork 1993, Optimal Brain Surgeon, in groups: Kurtic et al. 2023, ZipLM,
arXiv:2302.04089; Ling et al. 2024, SlimGPT, arXiv:2412.18110; OSSCAR, arXiv:2403.12983). With a
ridge, H + λI in place of H, the same V_K minimises the error plus λ|V_K - T_K|².
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import NumericalError


@dataclass(frozen=True)
class Level:
    """One selection among the columns that are left.

    Attributes:
        size: columns of a unit, which are neighbours.
        keep: units that stay of every pool.
        pools: equal runs of units, of each of which the same number stays.
    """

    size: int
    keep: int
    pools: int = 1


def ridged(hessian: Tensor, share: float) -> Tensor:
    """H + λI in fp64 with λ the share of the mean of H's diagonal.

    Args:
        hessian: H [in, in], any float dtype.
        share: at least 0.

    Raises:
        NumericalError: H is not finite.
    """
    matrix = hessian.double()
    if not bool(torch.isfinite(matrix).all()):
        raise NumericalError("second moments of a layer's inputs hold NaN or infinity")
    # Inputs that are zero everywhere get a diagonal too: they are the first to go.
    load = max(share * float(matrix.diagonal().mean()), torch.finfo(torch.float32).tiny)
    return matrix + load * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)


def obs_columns(
    target: Tensor, moment: Tensor, levels: Sequence[Level], *, steps: int = 64
) -> Tensor:
    """Columns to keep, found by removing the cheapest units and refitting the rest, in turn.

    Args:
        target: T fp64 [out, in].
        moment: positive definite H fp64 [in, in]; see `ridged`.
        levels: selections, each among the columns that the one before left.
        steps: rounds of a selection; several units go at once where more than this many go.

    Returns:
        int64, ascending.

    Raises:
        NumericalError: H has no Cholesky factor.
    """
    kept = torch.arange(target.shape[1], device=target.device)
    for level in levels:
        part = refitted(target, moment, kept)
        units = _obs_units(part, moment[kept][:, kept], level, steps)
        kept = kept[columns_of(units, level.size)]
    return kept


def _obs_units(target: Tensor, moment: Tensor, level: Level, steps: int) -> Tensor:
    weight, inverse = target.clone(), _inverse(moment)
    alive = torch.ones(weight.shape[1] // level.size, dtype=torch.bool, device=weight.device)
    stay = level.pools * level.keep
    at_once = max(1, -(-(len(alive) - stay) // steps))
    while (left := int(alive.sum()) - stay) > 0:
        costs = unit_costs(weight, inverse, level.size).masked_fill(~alive, float("inf"))
        gone = _cheapest(costs, alive, min(at_once, left), level)
        alive[gone] = False
        _remove(weight, inverse, columns_of(gone, level.size))
    return alive.nonzero()[:, 0]


def unit_costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """½ tr(W_S [(H⁻¹)_SS]⁻¹ W_Sᵀ) of every unit, [units]; of one that is gone, any number."""
    if size == 1:
        return 0.5 * weight.square().sum(0) / inverse.diagonal().clamp_min(_TINY)
    units = weight.shape[1] // size
    blocks = inverse.view(units, size, units, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    gone = blocks.diagonal(dim1=1, dim2=2).amax(1) <= 0
    eye = torch.eye(size, dtype=weight.dtype, device=weight.device)
    blocks = torch.where(gone[:, None, None], eye, blocks)
    grouped = weight.view(len(weight), units, size).permute(1, 2, 0)
    costs: Tensor = 0.5 * (grouped * torch.linalg.solve(blocks, grouped)).sum((1, 2))
    return costs


_TINY = 1e-300


def _cheapest(costs: Tensor, alive: Tensor, count: int, level: Level) -> Tensor:
    """Up to `count` cheapest units, at least one, no pool going below its share."""
    if level.pools == 1:
        return costs.topk(count, largest=False).indices
    spare = alive.view(level.pools, -1).sum(1) > level.keep
    by_pool = costs.view(level.pools, -1).masked_fill(~spare[:, None], float("inf"))
    best, unit = by_pool.min(1)  # one of every pool at a time
    pools = best.topk(min(count, int(spare.sum())), largest=False).indices
    return pools * by_pool.shape[1] + unit[pools]


def _remove(weight: Tensor, inverse: Tensor, columns: Tensor) -> None:
    """Take columns out of W and H⁻¹ in place: the others make up for them."""
    cross = inverse[columns]
    solved = torch.linalg.solve(cross[:, columns], cross)
    weight -= weight[:, columns] @ solved
    inverse -= cross.T @ solved
    weight[:, columns] = 0
    inverse[columns] = 0
    inverse[:, columns] = 0


def refitted(target: Tensor, moment: Tensor, kept: Tensor) -> Tensor:
    """V_K [out, kept]: the kept columns with what makes up for the others; T_K where none go.

    Args:
        target: T fp64 [out, in].
        moment: positive definite H fp64 [in, in].
        kept: columns K, int64 ascending.

    Raises:
        NumericalError: H_KK has no Cholesky factor.
    """
    gone = torch.ones(target.shape[1], dtype=torch.bool, device=target.device)
    gone[kept] = False
    if not bool(gone.any()):
        return target
    cross = target[:, gone] @ moment[gone][:, kept]
    return target[:, kept] + torch.cholesky_solve(cross.T, _cholesky(moment[kept][:, kept])).T


def shifted(weight: Tensor, moment: Tensor, drift: Tensor) -> Tensor:
    """T = W + C H⁻¹: the weights that also cancel an error D of the outputs as well as X allows.

    Args:
        weight: W fp64 [out, in].
        moment: positive definite H fp64 [in, in].
        drift: C = (2/N) D Xᵀ fp64 [out, in], D [out, N] what is to be added to the outputs.

    Raises:
        NumericalError: H has no Cholesky factor.
    """
    return weight + torch.cholesky_solve(drift.T, _cholesky(moment)).T


def best_columns(scores: Tensor, levels: Sequence[Level]) -> Tensor:
    """Columns to keep: those of the units whose scores have the largest sums in magnitude.

    Args:
        scores: of every column [in]; signed ones may cancel within a unit.
        levels: selections, each among the columns that the one before left.

    Returns:
        int64, ascending; of equal units the first ones.
    """
    kept = torch.arange(len(scores), device=scores.device)
    for level in levels:
        units = scores[kept].view(level.pools, -1, level.size).sum(2).abs()
        best = units.argsort(dim=1, descending=True, stable=True)[:, : level.keep]
        offset = torch.arange(level.pools, device=scores.device)[:, None] * units.shape[1]
        kept = kept[columns_of((best + offset).flatten().sort().values, level.size)]
    return kept


def wanda_scores(weight: Tensor, second: Tensor) -> Tensor:
    """mean_i |W_ij| · (E x_j²)^½ [in], structured Wanda (Sun et al. 2023, arXiv:2306.11695)."""
    return weight.abs().mean(0) * second.clamp_min(0).sqrt()


def flap_scores(weight: Tensor, second: Tensor, mean: Tensor) -> Tensor:
    """var(x_j) · |W_:j|² [in], FLAP's fluctuation (An et al. 2023, arXiv:2312.11983, eq. 5)."""
    return (second - mean.square()).clamp_min(0) * weight.square().sum(0)


def columns_of(units: Tensor, size: int) -> Tensor:
    """Columns of units of `size` neighbours, ascending where the units are."""
    inside = torch.arange(size, device=units.device)
    return (units[:, None] * size + inside).flatten()


def _cholesky(moment: Tensor) -> Tensor:
    factor: Tensor
    factor, failed = torch.linalg.cholesky_ex(moment)
    if bool(failed):
        raise NumericalError("second moments of a layer's inputs are singular; raise `damping`")
    return factor


def _inverse(moment: Tensor) -> Tensor:
    inverse: Tensor = torch.cholesky_inverse(_cholesky(moment))
    return inverse
