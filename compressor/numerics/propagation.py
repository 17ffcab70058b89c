"""Targets that make up for what earlier rounding did to a layer's inputs.

A layer of the original model computes W X. After earlier blocks were rounded it receives X̃, not
X, so that keeping W is no longer the best aim: minimising ‖W X - Ŵ X̃‖² is ridge regression,

    W* = W (G + λI)(H + λI)⁻¹    with H = (2/N) X̃ X̃ᵀ and G = (2/N) X X̃ᵀ,

where λI pulls towards W. GPTQ then rounds W* under H, which for λ → 0 is the rule of Qronos
(Zhang et al., 2025, "Qronos: Correcting the Past by Shaping the Future"). A blend of W and W*
overfits less when text is scarce (Arai & Ichikawa, "Quantization Error Propagation", 2025, eq. 8).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.numerics.gptq import HessianFactor
from compressor.numerics.hessian import (
    exact_products,
    full_precision,
    normalisation,
    pieces,
    require_finite,
)


class DriftAccumulator:
    """Sums (X - X̃) X̃ᵀ over batches in fp32: G - H, without the cancellation.

    Identical streams give exactly zero. Same batches in the same order: the same bits.

    Args:
        in_features: width of the inputs.
        device: where the sum lives; inputs are moved there.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, reference: Tensor, inputs: Tensor) -> None:
        """Count in the same tokens of both streams, X and X̃, each [tokens, in].

        Raises:
            NumericalError: a product holds NaN or infinity.
            ValueError: the streams differ in shape.
        """
        if reference.shape != inputs.shape:
            raise ValueError(
                f"the streams pair token by token: {list(reference.shape)} and {list(inputs.shape)}"
            )
        common = torch.promote_types(reference.dtype, inputs.dtype)
        # Of bf16 streams that are close, so is the difference, exactly; where they lie further
        # apart than a factor of two, it is rounded to bf16, as the units would round it.
        working = common if common == torch.bfloat16 else torch.float32
        with exact_products(common):
            streams = (pieces(rows, self._sum.device) for rows in (reference, inputs))
            for pair in zip(*streams, strict=True):
                x, y = (rows.to(self._sum.device, working) for rows in pair)
                self._sum.addmm_((x - y).to(self._sum).T, y.to(self._sum))
        require_finite(self._sum.diagonal())
        self.tokens += inputs.shape[0]

    def matrix(self) -> Tensor:
        """G - H = (2/N)(X - X̃) X̃ᵀ, fp32 [in, in]; not symmetric.

        Raises:
            NumericalError: no token has been seen.
        """
        return self._sum * normalisation(self.tokens)


def propagated_target(
    weight: Tensor, factor: HessianFactor, drift: Tensor, *, share: float
) -> Tensor:
    """(1-β) W + β W*, as W + β W (G - H)(H + λI)⁻¹: W itself where the streams agree.

    λ is the damping the factor was found with. Inputs that never fired keep their weights. Where
    no damping made H positive definite, W is returned: GPTQ rounds to nearest there.

    Args:
        weight: W [out, in].
        factor: of X̃, the inputs that the rounded layer will see.
        drift: G - H [in, in], in the same normalisation as the factor's Hessian.
        share: β in [0, 1].

    Returns:
        The target, fp32 [out, in], found with the factor that GPTQ has anyway.
    """
    if share == 0 or factor.failed:
        return weight.float()
    dense, order = weight.float(), factor.permutation
    pull = drift.to(dense)[:, order]
    pull[:, factor.dead[order]] = 0
    with full_precision():  # UᵀU = (H + λI)⁻¹; the shapes decide what is multiplied first
        step = torch.linalg.multi_dot((dense, pull, factor.upper.T, factor.upper))
    return dense.index_add(1, order, step, alpha=share)


def forward_pull(factor: HessianFactor, drift: Tensor, *, share: float) -> Tensor:
    """P, by which GPTAQ lets open columns answer the drift of a column that is being rounded.

    When column q is rounded, W X - Ŵ X̃ owes w_q (x_q - x̃_q) besides the rounding error. Least
    squares over the columns F still open adds w_q P_qF with P_qF = α D_qF (H_FF + λI)⁻¹, where
    D = G - H; with U of the factor, all of them at once are P = α triu(D Uᵀ, 1) U (Li et al.,
    "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", arXiv:2504.02692).

    Args:
        factor: of X̃, the inputs that the rounded layer will see.
        drift: G - H [in, in], in the same normalisation as the factor's Hessian.
        share: α in [0, 1].

    Returns:
        fp32 [in, in] in visiting order, strictly upper triangular; zero where the factor failed.
    """
    if factor.failed:
        return torch.zeros_like(factor.upper)
    order = factor.permutation
    pull = drift.float()[order.unsqueeze(1), order]
    with full_precision():
        return ((pull @ factor.upper.T).triu_(1) @ factor.upper).mul_(share)
