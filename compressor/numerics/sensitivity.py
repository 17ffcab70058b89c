"""What rounding a matrix costs the model, before anything is rounded.

To second order the divergence of a model from itself with W replaced by W - E is half the Fisher
information of E. With the Kronecker form of that information (Martens & Grosse, "Optimizing Neural
Networks with Kronecker-factored Approximate Curvature", 2015), of whose output side only the
diagonal is kept, it is per token

    KL ≈ ½ Σ_r γ_r · e_r H e_rᵀ,    γ_r = E[(∂ log p(y) / ∂ o_r)²],    H = E[x xᵀ],

with e_r the rows of E, o = W x the outputs and y drawn from the model's own predictions. A rounder
that compensates does not leave e_r H e_rᵀ of the nearest codes but, column by column in its order,
what no later column can make up for: Σ_i d_i e_ri² with d_i = 1 / U_ii² and Uᵀ U = (H + λI)⁻¹
(the same d as in the LDL decomposition of QuIP, Chee et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compressor.numerics.gptq import factorize
from compressor.numerics.grid import fit_grid, round_to_grid
from compressor.numerics.hessian import row_losses
from compressor.types import WeightScheme


def compensated_columns(moment: Tensor, *, damping: float) -> Tensor:
    """d [in]: what a squared error in each column costs after compensation by GPTQ.

    Args:
        moment: H = E[x xᵀ] [in, in].
        damping: λ as a share of mean diag(H), as the rounder will use.
    """
    factor = factorize(moment, damping=damping)
    if factor.failed:
        return moment.diagonal().clone()
    weights = torch.empty_like(moment.diagonal())
    weights[factor.permutation] = factor.upper.diagonal().pow(-2).to(weights)
    return weights


def rounding_losses(
    weight: Tensor,
    schemes: Sequence[WeightScheme],
    row_weight: Tensor,
    metric: Tensor,
    *,
    rows: int,
    scale_dtype: torch.dtype,
) -> list[float]:
    """Expected divergence of the model, nats per token, from rounding one matrix on each grid.

    Measured on some rows, spread evenly, and extrapolated by their share of Σ γ_r w_r M w_rᵀ, M
    being the diagonal of the metric: grids of rows do not depend on each other.

    Args:
        weight: [out, in], finite.
        schemes: grids to try.
        row_weight: γ [out], non-negative.
        metric: d [in] of `compensated_columns`, or H [in, in] for rounding to nearest.
        rows: most rows to measure on.
        scale_dtype: dtype in which scales are stored.
    """
    columns = metric if metric.ndim == 1 else metric.diagonal()
    shares = row_weight.double() * (weight.double().square() @ columns.double())
    chosen = _spread(len(weight), rows, weight.device)
    part, gamma = weight[chosen].float(), row_weight[chosen].double()
    measured = float(shares[chosen].sum())
    factor = 0.5 * float(shares.sum()) / measured if measured > 0 else 0.0
    found = []
    for scheme in schemes:
        grid = fit_grid(part, scheme, search="mse", scale_dtype=scale_dtype)
        error = part - round_to_grid(part, grid, scheme).dequantize().float()
        found.append(factor * float((gamma * _row_errors(error, metric)).sum()))
    return found


def _row_errors(error: Tensor, metric: Tensor) -> Tensor:
    """e_r M e_rᵀ of every row, fp64 [rows]."""
    if metric.ndim == 1:
        return error.double().square() @ metric.double()
    return row_losses(error, metric.to(error)).double()


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of the indices below `count`, evenly spread."""
    if count <= most:
        return torch.arange(count, device=device)
    return (torch.arange(most, device=device) * count) // most
