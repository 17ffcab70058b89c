"""What calibration text says about the inputs of matrices: sums, and the moments they become."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.numerics.hessian import HessianAccumulator
from compressor.numerics.propagation import DriftAccumulator


@dataclass(frozen=True)
class Moments:
    """What calibration text says about one input, or a batch of inputs.

    Attributes:
        hessian: H = (2/N) X̃ X̃ᵀ, fp32 [*, in, in]; X̃ are inputs that passed through rounded blocks.
        drift: G - H = (2/N)(X - X̃) X̃ᵀ, fp32 [in, in], with X the same tokens' inputs in the
            parent; None when the parent was not run beside, and for routed experts.
    """

    hessian: Tensor
    drift: Tensor | None = None


class MomentSums:
    """Moments of one input while tokens come in, domain by domain where domains are weighed.

    Args:
        width: of the input.
        device: where sums live.
        paired: tokens come with the parent's beside them.
        apart: sum every domain for itself.
    """

    def __init__(self, width: int, device: torch.device, *, paired: bool, apart: bool) -> None:
        self._width, self._device = width, device
        self._parts: dict[int, tuple[HessianAccumulator, DriftAccumulator | None]] = {}
        self._paired, self._apart = paired, apart

    def add(self, inputs: Tensor, reference: Tensor | None, domains: Tensor) -> None:
        """Count in tokens [tokens, in], with the parent's beside them, of domains [tokens]."""
        if not self._apart:
            self._count(0, inputs, reference)
            return
        for domain in sorted(set(domains.tolist())):
            own = domains == domain
            self._count(domain, inputs[own], None if reference is None else reference[own])

    def _count(self, part: int, inputs: Tensor, reference: Tensor | None) -> None:
        if part not in self._parts:
            drift = DriftAccumulator(self._width, self._device) if self._paired else None
            self._parts[part] = HessianAccumulator(self._width, self._device), drift
        hessian, drift = self._parts[part]
        hessian.add(inputs)
        if drift and reference is not None:
            drift.add(reference, inputs)

    @property
    def reached(self) -> bool:
        """Whether any token came in."""
        return bool(self._parts)

    def moments(self, ratios: Sequence[float]) -> Moments | None:
        """Both moments, a token of domain i counting ratios[i] times; None without any token."""
        if not self._apart:
            return next((_moments(*part) for part in self._parts.values()), None)
        counts = {i: ratios[i] * hessian.tokens for i, (hessian, _) in self._parts.items()}
        mixed: Moments | None = None
        for domain, part in sorted(self._parts.items()):
            share = counts[domain] / sum(counts.values())
            mixed = _blended(mixed, _moments(*part), share)
        return mixed


def _moments(hessian: HessianAccumulator, drift: DriftAccumulator | None) -> Moments:
    return Moments(hessian.matrix(), drift.matrix() if drift else None)


def _blended(so_far: Moments | None, part: Moments, share: float) -> Moments:
    """The sum with a share of another part; one matrix more than the parts at a time."""
    hessian = part.hessian.mul_(share)
    drift = None if part.drift is None else part.drift.mul_(share)
    if so_far is None:
        return Moments(hessian, drift)
    hessian = so_far.hessian.add_(hessian)
    if so_far.drift is not None and drift is not None:
        drift = so_far.drift.add_(drift)
    return Moments(hessian, drift)
