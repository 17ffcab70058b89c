"""Descent over orthogonal matrices: steps along the Cayley transform stay orthogonal.

With A skew-symmetric, (I + A/2)⁻¹ (I - A/2) is orthogonal, so that R ↦ (I + αA/2)⁻¹ (I - αA/2) R
stays where R is, and A = G Rᵀ - R Gᵀ with G = ∂L/∂R makes it the direction of steepest descent (Li
et al. 2020, "Efficient Riemannian optimization on the Stiefel manifold via the Cayley transform",
arXiv:2002.01113; used by SpinQuant, arXiv:2405.16406). Their iteration for the inverse is replaced
by a solve: the matrices here are small.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.types import WeightScheme


def descent(rotation: Tensor, gradient: Tensor) -> Tensor:
    """A [..., n, n], skew-symmetric, from R and ∂L/∂R of that shape."""
    product = gradient @ rotation.mT
    return product - product.mT


def turned(rotation: Tensor, direction: Tensor, angle: float) -> Tensor:
    """R after a turn by `angle` radians, as the root mean square over all channels.

    Args:
        rotation: orthogonal [..., n, n], fp64.
        direction: skew-symmetric, of that shape; only relative sizes count. Zero turns nothing.
        angle: small.
    """
    size = rotation.shape[-1]
    energy = direction.square().sum() / (direction.numel() / size)
    if not energy > 0:
        return rotation
    half = direction * (angle / energy.sqrt() / 2)
    unit = torch.eye(size, dtype=rotation.dtype, device=rotation.device)
    after: Tensor = torch.linalg.solve(unit + half, (unit - half) @ rotation)
    return after.contiguous()


def by_blocks(values: Tensor, blocks: Tensor) -> Tensor:
    """x diag(R₁, R₂, …) for x [..., k·b] and blocks [k, b, b]; gradients reach both."""
    count, size, _ = blocks.shape
    parts = values.reshape(-1, count, size).transpose(0, 1)
    return (parts @ blocks).transpose(0, 1).reshape(values.shape)


def through_grid(weight: Tensor, scheme: WeightScheme) -> Tensor:
    """Ŵ [out, in] on the symmetric min-max grid, differentiable.

    Rounding is flat, so that gradients pass it as if it were the identity; the scale, the largest
    magnitude of a group over half the number of steps, is differentiated as it is.
    """
    lowest, highest = scheme.code_range
    grouped = weight.reshape(len(weight), scheme.groups(weight.shape[1]), -1)
    scale = grouped.abs().amax(-1, keepdim=True).clamp_min(1e-12) / (highest + 0.5)
    steps = grouped / scale
    rounded = steps + (steps.round().clamp(lowest, highest) - steps).detach()
    return (rounded * scale).reshape(weight.shape)
