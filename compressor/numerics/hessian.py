"""Second moments of layer inputs, and the layer error they define.

For a linear layer with inputs X [in, N], the squared output error of replacing W by Ŵ is
tr(D H Dᵀ)·N/2 with D = W - Ŵ and H = (2/N) X Xᵀ (Frantar et al., GPTQ, 2022, eq. 1-2).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from compressor.errors import NumericalError

_BLOCK = 256


@contextmanager
def full_precision() -> Iterator[None]:
    """fp32 products in fp32, whatever the process has allowed (TF32, bf16); restored at exit."""
    with exact_products(torch.float32):
        yield


@contextmanager
def exact_products(inputs: torch.dtype) -> Iterator[None]:
    """fp32 sums of products that the fastest units form without rounding; restored at exit.

    Numbers that came as bf16 stay what they are when a unit takes its factors as bf16 (AMX,
    AVX512-BF16, tensor cores), and it adds their products in fp32. Others need all of fp32.

    Args:
        inputs: dtype that the numbers came in, before they were widened to fp32.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if inputs == torch.bfloat16 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def pieces(inputs: Tensor, device: torch.device) -> tuple[Tensor, ...]:
    """Rows of [tokens, in] in parts, as many as are widened to fp32 and multiplied at a time.

    A core's product is fastest while its factors stay in the second-level cache; larger units
    rather read the sum more seldom.
    """
    return torch.split(inputs, 512 if device.type == "cpu" else 2048)


class HessianAccumulator:
    """Sums X Xᵀ over batches in fp32. Same batches in the same order: the same bits.

    Args:
        in_features: width of the inputs.
        device: where the sum lives; inputs are moved there.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """Count in `inputs` [tokens, in] of any float dtype. Padding must be gone already.

        Raises:
            NumericalError: the inputs hold NaN or infinity, or their squares overflow fp32.
        """
        with exact_products(inputs.dtype):
            for part in pieces(inputs, self._sum.device):
                self._add_rows(part.to(self._sum))
        require_finite(self._sum.diagonal())
        self.tokens += inputs.shape[0]

    def _add_rows(self, rows: Tensor) -> None:
        """Only blocks on and above the diagonal: the rest mirrors them."""
        width = self._sum.shape[0]
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            self._sum[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])

    def merge(self, other: HessianAccumulator) -> None:
        """Count in everything `other` has seen."""
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def matrix(self) -> Tensor:
        """H = (2/N) X Xᵀ, fp32 [in, in], exactly symmetric.

        Raises:
            NumericalError: no token has been seen.
        """
        full = self._sum * normalisation(self.tokens)
        for start in range(0, len(full), _BLOCK):
            stop = min(start + _BLOCK, len(full))
            full[stop:, start:stop] = full[start:stop, stop:].T
            block = full[start:stop, start:stop]
            block.copy_(block.triu() + block.triu(1).T)
        return full

    def diagonal(self) -> Tensor:
        """diag(H), fp32 [in]."""
        return self._sum.diagonal() * normalisation(self.tokens)


class DiagonalAccumulator:
    """Only diag(H): all that an importance-weighted grid needs, in O(tokens · in).

    Args:
        in_features: width of the inputs.
        device: where the sum lives; inputs are moved there.
    """

    def __init__(self, in_features: int, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = 0

    def add(self, inputs: Tensor) -> None:
        """As `HessianAccumulator.add`."""
        rows = inputs.to(self._sum)
        self._sum += rows.square().sum(0)
        require_finite(self._sum)
        self.tokens += rows.shape[0]

    def merge(self, other: DiagonalAccumulator) -> None:
        """Count in everything `other` has seen."""
        self._sum += other._sum.to(self._sum.device)
        self.tokens += other.tokens

    def diagonal(self) -> Tensor:
        """diag(H) = 2·E[x²], fp32 [in]."""
        return self._sum * normalisation(self.tokens)


def shrink(moment: Tensor, share: float) -> Tensor:
    """(1-s) M + s diag(M): correlations scaled down by s, variances kept.

    Estimates from few tokens overstate correlations; shrinking them is the classic remedy (Ledoit
    & Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", 2004, with
    the diagonal as the target).

    Args:
        moment: M [*, in, in].
        share: s in [0, 1]; 0 returns M itself.
    """
    if share == 0:
        return moment
    variances = moment.diagonal(dim1=-2, dim2=-1)
    return (moment * (1 - share)).diagonal_scatter(variances, dim1=-2, dim2=-1)


def require_finite(sums: Tensor) -> None:
    """Refuse sums over inputs that are not numbers.

    Raises:
        NumericalError: the inputs hold NaN or infinity, or their products overflow fp32.
    """
    if not torch.isfinite(sums).all():
        raise NumericalError("the inputs of a layer hold NaN, infinity or values beyond 1e19")


def normalisation(tokens: int) -> float:
    """2/N, by which sums over tokens become H.

    Raises:
        NumericalError: no token has been seen.
    """
    if tokens == 0:
        raise NumericalError("no calibration token has reached this layer")
    return 2.0 / tokens


def add_product_(total: Tensor, left: Tensor, right: Tensor, *, alpha: float = 1) -> None:
    """total [*, m, n] += α left [*, m, k] right [*, k, n], in place; `*` is a batch or nothing."""
    add = total.addmm_ if total.ndim == 2 else total.baddbmm_
    add(left, right, alpha=alpha)


def row_losses(difference: Tensor, hessian: Tensor) -> Tensor:
    """d H dᵀ for every row d of `difference` [*, out, in] with its H [*, in, in]; at least 0.

    H is symmetric, so blocks above its diagonal count twice and those below are never read.

    Returns:
        [*, out] in the dtype of H, fp32 or fp64; `*` is a batch or nothing.
    """
    width = difference.shape[-1]
    losses = torch.zeros(difference.shape[:-1], dtype=hessian.dtype, device=hessian.device)
    with full_precision():
        for start in range(0, width, _BLOCK):
            stop = min(start + _BLOCK, width)
            part = difference[..., start:stop]
            product = part @ hessian[..., start:stop, start:stop]
            later = hessian[..., start:stop, stop:].mT
            add_product_(product, difference[..., stop:], later, alpha=2)
            losses += product.mul_(part).sum(-1)
    return losses.clamp_min_(0)


def relative_loss(weight: Tensor, quantized: Tensor, hessian: Tensor | None) -> float:
    """tr(D H Dᵀ) / tr(W H Wᵀ) with D = W - Ŵ: the share of output energy that is lost.

    Args:
        weight: W [out, in].
        quantized: Ŵ [out, in], dense.
        hessian: H [in, in], any scale; None means the identity.
    """
    return float(relative_losses(weight, [quantized], hessian)[0])


def relative_losses(
    weight: Tensor, quantized: Sequence[Tensor], hessian: Tensor | None
) -> list[Tensor]:
    """`relative_loss`, fp64 [*], of several Ŵ [*, out, in] that stand for the same W."""
    dense = weight if hessian is None else weight.to(hessian)
    total = _energy(dense, hessian)
    lost = [_energy(dense - other.to(dense), hessian) for other in quantized]
    return [torch.where(loss == 0, 0.0, loss / total) for loss in lost]  # nothing of nothing is 0


def _energy(matrix: Tensor, hessian: Tensor | None) -> Tensor:
    """tr(M H Mᵀ), fp64 [*]."""
    rows = matrix.square().sum(-1) if hessian is None else row_losses(matrix, hessian)
    return rows.double().sum(-1)
