"""Orthogonal matrices that spread outliers: randomized Hadamard, and random orthogonal.

A channel that is a hundred times the others becomes, after x → xR with every |R_ij| = 1/√n, a
term of size 1/√n of it in each channel, which a shared scale can represent (QuIP#,
arXiv:2402.04396; QuaRot, arXiv:2404.00456). Everything is computed in fp64.

A Hadamard matrix is kept as a Kronecker product of small factors. Applying them one after the
other is the fast Walsh-Hadamard transform with a radix of up to 64 instead of 2: n·Σfᵢ
multiplications a row instead of n², in matrix products rather than in passes over memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod, sqrt
from typing import Literal

import torch
from torch import Tensor

from compressor.numerics.cayley import by_blocks
from compressor.numerics.hadamard_orders import (
    field_order,
    hadamard_block,
    hadamard_split,
    prime_root,
)

Kind = Literal["hadamard", "orthogonal"]

_RADIX_BITS = 6  # factors of at most 64: fewer operations would cost more passes over memory


@dataclass(frozen=True)
class Rotation:
    """R = diag(signs) · (I ⊗ F₁ ⊗ F₂ ⊗ …), orthogonal, [n, n], fp64.

    Attributes:
        signs: ±1, [n].
        factors: orthogonal matrices [fᵢ, fᵢ]. Where their sizes multiply to less than n, the
            matrix is block-diagonal with equal blocks (the I above).
    """

    signs: Tensor
    factors: tuple[Tensor, ...]

    @property
    def size(self) -> int:
        """n."""
        return len(self.signs)

    @property
    def block(self) -> int:
        """Size of a diagonal block; `size` when every channel meets every other."""
        return prod(len(factor) for factor in self.factors)

    def right(self, tensor: Tensor) -> Tensor:
        """x R for x [..., n], in fp64 on the tensor's device."""
        rotated = tensor.double() * self.signs.to(tensor.device)
        tail = 1
        for factor in reversed(self.factors):
            own = factor.to(tensor.device)
            if tail == 1:
                rotated = rotated.reshape(-1, len(own)) @ own
            else:
                rotated = own.T @ rotated.reshape(-1, len(own), tail)
            tail *= len(own)
        return rotated.reshape(tensor.shape)

    def left(self, tensor: Tensor) -> Tensor:
        """Rᵀ x for x [..., n, m], in fp64 on the tensor's device."""
        return self.right(tensor.mT).mT

    def dense(self) -> Tensor:
        """R itself, [n, n]."""
        return self.right(torch.eye(self.size, dtype=torch.float64))


@dataclass(frozen=True)
class Turned:
    """R C: a rotation followed by a block-diagonal one.

    Attributes:
        start: R [n, n], itself turned or not.
        blocks: orthogonal blocks of C [k, n / k, n / k], fp64.
    """

    start: Rotation | Turned
    blocks: Tensor

    @property
    def size(self) -> int:
        """n."""
        return self.start.size

    def right(self, tensor: Tensor) -> Tensor:
        """x R C for x [..., n], in fp64 on the tensor's device."""
        return by_blocks(self.start.right(tensor), self.blocks.to(tensor.device))

    def left(self, tensor: Tensor) -> Tensor:
        """(R C)ᵀ x for x [..., n, m], in fp64 on the tensor's device."""
        return self.right(tensor.mT).mT

    def dense(self) -> Tensor:
        """R C itself, [n, n]."""
        return self.right(torch.eye(self.size, dtype=torch.float64))


def random_rotation(size: int, seed: int, kind: Kind = "hadamard") -> Rotation:
    """A seeded rotation.

    Args:
        size: n.
        seed: the same seed gives the same matrix.
        kind: `hadamard`, with random signs; block-diagonal where no Hadamard matrix of the size
            can be built. `orthogonal`, uniform over all orthogonal matrices (the Q of a Gaussian
            matrix, Mezzadri 2007): any size, but n² operations a row.
    """
    generator = torch.Generator().manual_seed(seed)
    if kind == "orthogonal":
        return Rotation(torch.ones(size, dtype=torch.float64), (_uniform(size, generator),))
    signs = 2.0 * torch.randint(0, 2, (size,), generator=generator).double() - 1.0
    return Rotation(signs, hadamard_factors(hadamard_block(size)))


def hadamard_factors(size: int) -> tuple[Tensor, ...]:
    """Orthogonal factors [fᵢ, fᵢ] whose Kronecker product is a Hadamard matrix over √size.

    Raises:
        ValueError: no Hadamard matrix of this size can be built here.
    """
    split = hadamard_split(size)
    if split is None:
        raise ValueError(f"no Hadamard matrix of order {size} can be built")
    order, power = split
    factors = [paley(order)] if order > 1 else []
    bits = power.bit_length() - 1
    count = -(-bits // _RADIX_BITS)
    factors += [_sylvester((bits + place) // count) for place in range(count)]
    return tuple(factor / sqrt(len(factor)) for factor in factors or [_sylvester(0)])


def paley(order: int) -> Tensor:
    """Hadamard matrix [order, order] of ±1 from quadratic residues (Paley 1933).

    Raises:
        ValueError: neither construction gives this order.
    """
    field = field_order(order)
    if field is None:
        raise ValueError(f"there is no Paley matrix of order {order}")
    q, construction = field
    residues = _residues(q)
    conference = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    conference[0, 1:], conference[1:, 1:] = 1.0, residues
    conference[1:, 0] = -1.0 if construction == 1 else 1.0
    unit = torch.eye(q + 1, dtype=torch.float64)
    if construction == 1:  # Q is antisymmetric
        return conference + unit
    plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
    minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
    return torch.kron(conference, plus) + torch.kron(unit, minus)


def _residues(q: int) -> Tensor:
    """Q [q, q] with Q_ij = χ(i - j): 1 for a square of the field, -1 for none, 0 for zero.

    In GF(p²) = GF(p)[√r] an element a + b√r is a square exactly if its norm a² - rb² is a square
    in GF(p), because χ(x) = x^((q-1)/2) = (x^(p+1))^((p-1)/2).
    """
    p, degree = prime_root(q)
    squares = torch.full((p,), -1.0, dtype=torch.float64)
    squares[torch.arange(1, p) ** 2 % p] = 1.0
    squares[0] = 0.0
    elements = torch.arange(q)
    low, high = elements % p, elements // p  # a and b; b is zero in a prime field
    below = (low[:, None] - low) % p
    if degree == 1:
        return squares[below]
    above = (high[:, None] - high) % p
    root = int((squares == -1.0).nonzero()[0])
    return squares[(below**2 - root * above**2) % p]


def _sylvester(bits: int) -> Tensor:
    """Hadamard matrix [2^bits, 2^bits] of ±1: entry (i, j) is the parity of the bits of i & j."""
    index = torch.arange(1 << bits)
    common = index[:, None] & index
    parity = torch.zeros_like(common)
    for bit in range(bits):
        parity ^= common >> bit & 1
    return 1.0 - 2.0 * parity.double()


def _uniform(size: int, generator: torch.Generator) -> Tensor:
    """Haar-distributed orthogonal matrix; without the signs Q would depend on the QR's choice."""
    gaussian = torch.randn(size, size, generator=generator, dtype=torch.float64)
    basis, triangle = torch.linalg.qr(gaussian)
    uniform: Tensor = basis * triangle.diagonal().sign()
    return uniform
