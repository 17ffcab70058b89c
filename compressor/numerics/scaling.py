"""Scales on the inputs of linear layers: chosen so that rounding hurts less, folded exactly.

y = W x = (W diag(s)) (diag(s)⁻¹ x) for every s > 0. If what produces x is linear in a parameter of
its own (the weight of a norm, the rows of the matrix before), the division folds into that
parameter and the model computes the same function, with weights that round differently. AWQ
searches s by the output error after rounding (Lin et al. 2023, arXiv:2306.00978, eq. 4-5);
SmoothQuant writes it down (Xiao et al. 2022, arXiv:2211.10438, eq. 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.numerics.grid import Search
from compressor.numerics.grid_search import TRIES
from compressor.numerics.hessian import full_precision, require_finite, row_losses
from compressor.numerics.rtn import rtn
from compressor.types import WeightScheme

_LEAST = 1e-4  # smallest scale before normalisation, as in AWQ's code
_LEAST_SMOOTHING = 1e-5  # the same in SmoothQuant's code
_INT8_LEVELS = 127


class MagnitudeAccumulator:
    """Mean |x|, mean x² and max |x| of every input, over batches.

    Args:
        in_features: width of the inputs.
        device: where the sums live; inputs are moved there.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._absolute = torch.zeros(in_features, dtype=torch.float32, device=device)
        self._square = torch.zeros_like(self._absolute)
        self.peak = torch.zeros_like(self._absolute)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count in `inputs` [tokens, in] of any float dtype. Padding must be gone already.

        Raises:
            NumericalError: the inputs hold NaN or infinity, or their squares overflow fp32.
        """
        rows = inputs.to(self._absolute).abs()
        self._absolute += rows.sum(0)
        self._square += rows.square().sum(0)
        require_finite(self._square)
        if rows.shape[0]:
            self.peak = torch.maximum(self.peak, rows.amax(0))
        self.tokens += rows.shape[0]

    @property
    def mean(self) -> Tensor:
        """E|x|, fp32 [in]."""
        return self._absolute / max(self.tokens, 1)

    @property
    def energy(self) -> Tensor:
        """E[x²], fp32 [in]."""
        return self._square / max(self.tokens, 1)


def weight_magnitude(weights: Sequence[Tensor], group_size: int | None) -> Tensor:
    """AWQ's w̄ [in]: mean over all rows of |w| / max |w| of its group; in [0, 1].

    Args:
        weights: matrices [out, in] that see the same input.
        group_size: inputs that share a scale, which divides `in`; None for all of them.
    """
    in_features = weights[0].shape[1]
    stacked = torch.cat([weight.float().abs() for weight in weights])
    grouped = stacked.reshape(len(stacked), -1, group_size or in_features)
    peak = grouped.amax(-1, keepdim=True)
    return torch.where(peak > 0, grouped / peak, 0.0).reshape(-1, in_features).mean(0)


def candidates(inputs: Tensor, divisors: Sequence[Tensor | None], steps: int) -> Iterator[Tensor]:
    """Scales [in] that AWQ tries; the first is the identity.

    With a = E|x| and r in `steps` equal steps from 0 to 1: a^r for a divisor None, and
    a^r / (w̄^(1-r) + 1e-4) for a divisor w̄, each normalised by √(max · min).

    Args:
        inputs: a [in], non-negative. An input that is always zero counts as the smallest other.
        divisors: None or w̄ [in] of `weight_magnitude`, each tried at every step.
        steps: at least 2.
    """
    yield torch.ones_like(inputs)
    live = inputs > 0
    if not live.any():
        return
    magnitude = torch.where(live, inputs, inputs[live].amin())
    for ratio in torch.linspace(0, 1, steps).tolist():
        for divisor in divisors:
            if divisor is not None:
                yield _normalised(magnitude.pow(ratio) / (divisor.pow(1 - ratio) + 1e-4))
            elif ratio:  # a⁰ is the identity again
                yield _normalised(magnitude.pow(ratio))


def _normalised(scale: Tensor) -> Tensor:
    """Balanced about 1: the largest and the smallest are each other's inverse."""
    scale = scale.clamp_min(_LEAST)
    return scale / (scale.amax() * scale.amin()).sqrt()


def smoothing_scale(inputs: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """SmoothQuant's s_j = max|x_j|^α / max|W_:,j|^(1-α), fp32 [in].

    Args:
        inputs: max |x| of every input [in].
        weights: max |w| of every column, over all matrices that see the input [in].
        alpha: 0 leaves the weights flat, 1 the inputs. Where either maximum is zero there is
            nothing to balance and s = 1.
    """
    scale = inputs.pow(alpha) / weights.pow(1 - alpha)
    return torch.where((inputs > 0) & (weights > 0), scale.clamp_min(_LEAST_SMOOTHING), 1.0)


@dataclass(frozen=True)
class Choice:
    """The best of the scales that were tried.

    Attributes:
        scale: [in]; None when nothing was better than the identity.
        loss: its loss, at most `identity_loss`.
        identity_loss: without scaling.
    """

    scale: Tensor | None
    loss: float
    identity_loss: float


def shortlist(
    scales: Iterable[Tensor], loss: Callable[[Tensor], float], size: int
) -> Iterator[Tensor]:
    """The identity, and the `size` others of the lowest loss, in the order they came in.

    Args:
        scales: the identity, then the others.
        loss: a cheap one, as for `best_scale`; the identity's is not asked for.
        size: how many others to keep.
    """
    identity, *rest = scales
    losses = [loss(scale) for scale in rest]
    ranked = sorted(range(len(rest)), key=lambda i: (losses[i] != losses[i], losses[i]))
    return iter([identity, *(rest[i] for i in sorted(ranked[:size]))])


def best_scale(scales: Iterable[Tensor], loss: Callable[[Tensor], float]) -> Choice:
    """The scale of the lowest loss; among equals the first.

    Args:
        scales: the identity, then the others. A loss that is NaN is never the lowest.
        loss: of the layers' output after rounding at this scale.

    Raises:
        NumericalError: the loss of the identity is not finite.
    """
    rest = iter(scales)
    identity = loss(next(rest))
    if not identity < float("inf"):
        raise NumericalError("the output of a layer is not finite after rounding its weights")
    best: Tensor | None = None
    lowest = identity
    for scale in rest:
        value = loss(scale)
        if value < lowest:
            best, lowest = scale, value
    return Choice(best, lowest, identity)


def rounded_at(
    weight: Tensor,
    scale: Tensor,
    scheme: WeightScheme,
    *,
    search: Search,
    energy: Tensor,
    dtype: torch.dtype,
    tries: int = TRIES,
) -> Tensor:
    """Q(W·s)/s, fp32 [out, in]: what the layer multiplies with when it is rounded at scale s.

    Args:
        weight: W [out, in].
        scale: s [in].
        scheme: the grid.
        search: how its scales are chosen; `imatrix` weighs with E[x²]/s².
        energy: E[x²] [in]; read by `imatrix` only.
        dtype: in which the grid's scales are stored.
        tries: ranges that the search tries.
    """
    importance = energy / scale.square() if search == "imatrix" else None
    scaled = weight.float() * scale
    rounded = rtn(
        scaled, scheme, search=search, importance=importance, scale_dtype=dtype, tries=tries
    )
    return rounded.dequantize().float() / scale


def output_error(weights: Sequence[Tensor], rounded: Sequence[Tensor], hessian: Tensor) -> float:
    """Σ tr(D H Dᵀ) with D = W - Ŵ: squared output error of layers that see the same input.

    Args:
        weights, rounded: matrices [out, in].
        hessian: H [in, in] of the input, any scale.
    """
    total = 0.0
    for weight, other in zip(weights, rounded, strict=True):
        difference = weight.to(hessian) - other.to(hessian)
        total += row_losses(difference, hessian).double().sum().item()
    return total


def fold_norm(
    weight: Tensor, scale: Tensor, *, offset: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Divide a norm's weight by s, as it can be stored, and the s that this amounts to.

    A stored w' = w/s is rounded, so the matrices behind it are multiplied by w/w' instead of s:
    the product is then exact whatever `dtype` is.

    Args:
        weight: [in] as on disk.
        scale: s [in].
        offset: what the norm adds to its stored weight (1 for Gemma, else 0).
        dtype: in which the weight is stored.

    Returns:
        The weight to store, in `dtype`, and the exact scale, fp32; 1 with the weight unchanged
        where it is zero or would vanish.
    """
    factor = weight.double() + offset
    stored = (factor / scale.double() - offset).to(dtype)
    left = stored.double() + offset
    exact = torch.where(left != 0, factor / left, 0.0)
    usable = torch.isfinite(exact) & (exact > 0)
    return torch.where(usable, stored, weight.to(dtype)), torch.where(usable, exact, 1.0).float()


def tie_heads(values: Tensor, kv_heads: int, share: int) -> Tensor:
    """Mean over the query heads that share a key-value head: [kv·share·d] to [kv·d]."""
    return values.reshape(kv_heads, share, -1).mean(1).reshape(-1)


def spread_heads(values: Tensor, kv_heads: int, share: int) -> Tensor:
    """One value per channel of v for every channel of o that reads it: [kv·d] to [kv·share·d].

    Query head h reads key-value head h // share, as transformers' `repeat_kv` has it.
    """
    by_head = values.reshape(kv_heads, 1, -1)
    return by_head.expand(kv_heads, share, by_head.shape[-1]).reshape(-1)


def int8_output_error(inputs: Tensor, weights: Sequence[Tensor], scale: Tensor) -> float:
    """Relative squared output error of W8A8: ‖x̂ Ŵᵀ - x Wᵀ‖² / ‖x Wᵀ‖² at scale s.

    x̂ is x/s rounded per token, Ŵ is W·s rounded per output channel, both to symmetric 8 bits.

    Args:
        inputs: x [tokens, in].
        weights: matrices [out, in] that see it.
        scale: s [in].
    """
    inputs = inputs.float()
    smooth, lost, total = _int8_rows(inputs / scale), 0.0, 0.0
    with full_precision():
        for weight in weights:
            dense = weight.float()
            exact = inputs @ dense.T
            lost += (smooth @ _int8_rows(dense * scale).T - exact).double().square().sum().item()
            total += exact.double().square().sum().item()
    return lost / total if total else 0.0


def _int8_rows(rows: Tensor) -> Tensor:
    """Every row on its own symmetric 8-bit grid."""
    step = rows.abs().amax(-1, keepdim=True) / _INT8_LEVELS
    return torch.where(step > 0, (rows / step).round() * step, 0.0)
