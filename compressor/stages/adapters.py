"""Low-rank adapters on the matrices of a live model, trained in their place and merged afterwards.

W + B A with A [rank, in] random and B [out, rank] zero at first (Hu et al. 2021, "LoRA",
arXiv:2106.09685): gradients and moments are those of A and B alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from compressor.model.architecture import Architecture


class LowRank(nn.Module):
    """Adds B A to a weight.

    Args:
        weight: [out, in], whichever way round it is stored.
        rank: of the sum.
        generator: draws A.
    """

    def __init__(self, weight: Tensor, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        drawn = torch.randn(rank, columns, generator=generator) / columns**0.5
        self.right = nn.Parameter(drawn.to(weight))
        self.left = nn.Parameter(torch.zeros(rows, rank).to(weight))

    def forward(self, weight: Tensor) -> Tensor:
        """W + B A."""
        return weight + self.left @ self.right


def adapt(student: Any, architecture: Architecture, rank: int, seed: int) -> None:
    """Put adapters on every matrix of the blocks.

    Args:
        student: the live model; its own weights take no gradients from now on.
        architecture: its map.
        rank: of every adapter.
        seed: of their beginnings.
    """
    student.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for matrix in architecture.matrices:
        if matrix.block is None:
            continue
        name = architecture.module_tensor(matrix.tensor).removesuffix(".weight")
        module = student.get_submodule(name)
        adapter = LowRank(module.weight, rank, generator)
        parametrize.register_parametrization(module, "weight", adapter)


def merged(student: Any) -> Iterator[tuple[str, Tensor]]:
    """The sums, under the names that the weights have without adapters."""
    for name, module in student.named_modules():
        if parametrize.is_parametrized(module, "weight"):
            yield f"{name}.weight", module.weight
