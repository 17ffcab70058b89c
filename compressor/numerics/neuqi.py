"""NeUQI: scale and zero-point of an asymmetric group searched together.

Lin et al., "NeUQI: Near-Optimal Uniform Quantization Parameter Initialization", 2025: for each of
many scales the best zero-point, coarse to fine over the scale. The paper has real zero-points,
which no format here can store. With integer ones the best is found exactly, and for all of them at
once: which integer a weight over its scale is nearest to does not depend on the zero-point, only
where it is clipped does, so that sums over the weights nearest to each integer are enough.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.numerics.grid_search import Best, Objective, better, factors, refitted

_FINER = 2  # rounds about the best scale, each within a step of the one before
_FINER_STEPS = 8


def joint_search(objective: Objective, best: Best, widest: Tensor) -> Best:
    """Shrunken ranges with the best zero-point of each, then finer and finer about the best.

    Args:
        objective: what is minimised; its groups are asymmetric.
        best: where to start; the result is at least as good in every group.
        widest: the unrounded min-max scale.
    """
    tried = factors(objective.stored.scheme)
    for factor in tried:
        best = _with_zero_point(objective, best, widest * factor)
    step = abs(tried[0] - tried[1])
    for _ in range(_FINER):
        centre = best[1]
        for change in torch.linspace(-step, step, _FINER_STEPS).tolist():
            wanted = torch.maximum(centre + widest * change, centre / 2)
            best = _with_zero_point(objective, best, wanted)
        step *= 2 / (_FINER_STEPS - 1)
    return refitted(objective, best)


def _with_zero_point(objective: Objective, best: Best, wanted: Tensor) -> Best:
    scale = objective.stored.scale(wanted)
    return better(objective, best, scale, best_zero_point(objective, scale))


def best_zero_point(objective: Objective, scale: Tensor) -> Tensor:
    """The integer zero-point with the least weighted error at a scale, of all that can be stored.

    In steps u = w/s, a range that begins at the integer e costs Σ h (u - e)² over the weights
    below it, the same with its other end over those above, and Σ h (u - round(u))² over the rest.
    What the dense dtype rounds off a product is left out.
    """
    lowest, highest = objective.stored.scheme.code_range
    levels = highest - lowest
    steps = objective.weight / scale
    if objective.stored.scheme.bits > 4:
        steps = steps.double()  # squares of large integers cancel below
    nearest = steps.round()
    relative = objective.emphasis / objective.emphasis.amax(-1, keepdim=True)
    weights = relative.square().expand_as(steps)
    # Integers from -(levels + 1) to levels + 1: what lies further out is clipped by every range.
    index = nearest.clamp(-levels - 1, levels + 1).add_(levels + 1).long()
    empty = steps.new_zeros((*steps.shape[:-1], 2 * levels + 3))

    def sums(values: Tensor) -> Tensor:
        return empty.scatter_add(-1, index, values).cumsum(-1)

    moments = [sums(weights * steps**power) for power in range(3)]
    kept = sums(weights * (steps - nearest).square())
    below, within = slice(0, levels + 1), slice(levels + 1, 2 * levels + 2)
    begin = torch.arange(-levels, 1, device=steps.device)
    cost = kept[..., within] - kept[..., below]
    cost += _squares([moment[..., below] for moment in moments], begin)
    cost += _squares([m[..., -1:] - m[..., within] for m in moments], begin + levels)
    return (highest - cost.argmin(-1, keepdim=True)).to(scale)


def _squares(moments: Sequence[Tensor], end: Tensor) -> Tensor:
    """Σ h (u - end)² from Σ h, Σ h u and Σ h u²."""
    return moments[2] - 2 * end * moments[1] + end.square() * moments[0]
