"""What rounding a matrix costs the model, before anything is rounded.

To second order the divergence of a model from itself with W replaced by W - E is half the Fisher
information of E. With the Kronecker form of that information (Martens & Grosse, "Optimizing Neural
Networks with Kronecker-factored Approximate Curvature", 2015), of whose output side only the
diagonal is kept, it is per token

    KL ≈ ½ Σ_r γ_r · e_r H e_rᵀ,    γ_r = E[(∂ log p(y) / ∂ o_r)²],    H = E[x xᵀ],

with e_r the rows of E, o = W x the outputs and y drawn from the model's own predictions. A head
needs no draw: there γ_r is p_r (1 - p_r), token by token. An embedding looks rows up instead of
multiplying by them: its row r counts ½ f_r · e_r G e_rᵀ, f_r being the share of tokens that are r
and G = E[g gᵀ] the moment of the gradients where rows enter the model.

A rounder that compensates does not leave e_r H e_rᵀ of the nearest codes. An error e_ri moves the
later columns by e_ri U_ij / U_ii, with Uᵀ U = (H + λI)⁻¹ in its order, and Σ_i d_i e_ri² is left of
it, with d_i = (U H Uᵀ)_ii / U_ii². Without damping that is 1 / U_ii², the d of the LDL
decomposition of QuIP (Chee et al. 2023, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compressor.numerics.columns import in_order
from compressor.numerics.gptq import factorize
from compressor.numerics.grid import Search, fit_grid, round_to_grid
from compressor.numerics.hessian import row_losses
from compressor.types import WeightScheme


@dataclass(frozen=True)
class Metric:
    """What errors of a rounder cost at the outputs, and what it fits its grids by.

    Attributes:
        cost: d [in] of single columns, or H [in, in].
        importance: of inputs [in]; None where grids are fitted by plain squares.
    """

    cost: Tensor
    importance: Tensor | None = None

    @property
    def columns(self) -> Tensor:
        """What errors cost column by column [in]."""
        return self.cost if self.cost.ndim == 1 else self.cost.diagonal()

    def of_rows(self, error: Tensor) -> Tensor:
        """What errors [rows, in] cost, fp64 [rows]."""
        if self.cost.ndim == 1:
            return error.double().square() @ self.cost.double()
        return row_losses(error, self.cost.to(error)).double()


def compensated(moment: Tensor, *, damping: float) -> Metric:
    """What GPTQ leaves of an error in each column, on grids fitted by what it makes up for.

    Args:
        moment: H = E[x xᵀ] [in, in].
        damping: λ as a share of mean diag(H), as the rounder will use.
    """
    factor = factorize(moment, damping=damping)
    if factor.failed:
        return Metric(moment.diagonal().clone())
    upper = factor.upper
    left = (upper @ in_order(moment, factor.permutation).to(upper) * upper).sum(1)
    cost = torch.empty_like(left)
    cost[factor.permutation] = left / upper.diagonal().square()
    return Metric(cost, factor.curvature())


def rounding_losses(
    weight: Tensor,
    schemes: Sequence[WeightScheme],
    row_weight: Tensor,
    metric: Metric,
    *,
    rows: int,
    scale_dtype: torch.dtype,
) -> list[float]:
    """Expected divergence of the model, nats per token, from rounding one matrix on each grid.

    Measured on some rows, spread evenly, and extrapolated by their share of Σ γ_r w_r M w_rᵀ, M
    being what single columns cost: grids of rows do not depend on each other.

    Args:
        weight: [out, in], finite.
        schemes: grids to try.
        row_weight: γ [out], non-negative.
        metric: `compensated`, or H [in, in] for rounding to nearest.
        rows: most rows to measure on.
        scale_dtype: dtype in which scales are stored.
    """
    shares = row_weight.double() * (weight.double().square() @ metric.columns.double())
    chosen = _spread(len(weight), rows, weight.device)
    gamma = row_weight[chosen].double()
    measured = float(shares[chosen].sum())
    factor = 0.5 * float(shares.sum()) / measured if measured > 0 else 0.0
    return [
        factor * float((gamma * metric.of_rows(error)).sum())
        for error in rounding_errors(weight[chosen], schemes, scale_dtype, metric.importance)
    ]


def token_shares(counts: Tensor) -> Tensor:
    """How often each token is to be expected, [vocab], positive and summing to 1.

    Tokens that were not seen share what Good (1953) and Turing give them: the share of those
    seen once.

    Args:
        counts: how often each was seen [vocab], at least one of them.
    """
    counts = counts.double()
    unseen = counts == 0
    missing = int(unseen.sum())
    if not missing:
        return counts / counts.sum()
    rest = max(int((counts == 1).sum()), 1) / (float(counts.sum()) + 1)
    return torch.where(unseen, rest / missing, counts / counts.sum() * (1 - rest))


def proportional_rows(sizes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows drawn with chances in proportion to their size, and how many rows each stands for.

    Systematic sampling (Madow 1949) without any randomness; the sum of a quantity of the rows
    drawn, each times what it stands for, estimates the sum over all rows (Horvitz & Thompson).

    Args:
        sizes: positive, [rows].
        count: rows to draw.
    """
    if len(sizes) <= count:
        return torch.arange(len(sizes), device=sizes.device), torch.ones_like(sizes)
    chances = _capped(sizes.double(), count)
    passed = (chances.cumsum(0) - 0.5).ceil().long()
    drawn = (passed.diff(prepend=torch.zeros_like(passed[:1])) > 0).nonzero()[:, 0]
    return drawn, 1 / chances[drawn]


def _capped(sizes: Tensor, count: int) -> Tensor:
    """Chances in proportion to sizes that sum to `count`, none above 1."""
    chances = count * sizes / sizes.sum()
    while bool((chances > 1 + 1e-9).any()):
        sure = chances >= 1
        left = count - int(sure.sum())
        chances = torch.where(sure, 1.0, left * sizes / sizes[~sure].sum())
    return chances.clamp_max(1.0)


def rounding_errors(
    weight: Tensor,
    schemes: Sequence[WeightScheme],
    scale_dtype: torch.dtype,
    importance: Tensor | None = None,
) -> Iterator[Tensor]:
    """W - Ŵ [rows, in] for rounding to nearest on each grid, fp32."""
    part = weight.float()
    search: Search = "mse" if importance is None else "imatrix"
    for scheme in schemes:
        grid = fit_grid(part, scheme, search=search, importance=importance, scale_dtype=scale_dtype)
        yield part - round_to_grid(part, grid, scheme).dequantize().float()


def head_losses(error: Tensor, inputs: Tensor, chances: Tensor) -> Tensor:
    """½ Σ_t p_tr (1 - p_tr) (e_r · x_t)² for every row of a head, fp64 [rows].

    Args:
        error: e_r [rows, in].
        inputs: x_t, what enters the head [tokens, in].
        chances: p_tr, what the model predicts of the rows' tokens [tokens, rows].
    """
    moved = inputs.to(error) @ error.T
    return 0.5 * (chances * (1 - chances) * moved.square()).double().sum(0)


def lookup_losses(error: Tensor, moment: Tensor, shares: Tensor) -> Tensor:
    """½ f_r · e_r G e_rᵀ for every row of an embedding, fp64 [rows].

    Args:
        error: e_r [rows, in].
        moment: G [in, in].
        shares: f_r [rows].
    """
    return 0.5 * shares.double() * row_losses(error, moment.to(error)).double()


def _spread(count: int, most: int, device: torch.device) -> Tensor:
    """At most `most` of the indices below `count`, evenly spread."""
    if count <= most:
        return torch.arange(count, device=device)
    return (torch.arange(most, device=device) * count) // most
