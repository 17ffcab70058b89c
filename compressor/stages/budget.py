"""What grids cost in bytes, which matrices must share one, and what a budget leaves for them.

Pure arithmetic on an architecture, so that the plan can refuse a budget without weights.
"""

from __future__ import annotations

import heapq
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from compressor.formats.sizes import STORED, packed_bytes
from compressor.model.architecture import Architecture, Matrix
from compressor.types import WeightScheme

FUSED = (("q", "k", "v"), ("gate", "up"))
"""Roles that engines such as vLLM and SGLang merge into one matrix of one grid."""

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|kB|MB|GB|KiB|MiB|GiB)")


@dataclass(frozen=True)
class Unit:
    """Matrices that get one grid together.

    Attributes:
        matrices: one, or those that an engine fuses.
        schemes: grids to choose from, which all of them can have.
        costs: bytes of all the matrices in a compressed-tensors export on each of the grids.
    """

    matrices: tuple[Matrix, ...]
    schemes: tuple[WeightScheme, ...]
    costs: tuple[int, ...]

    @property
    def parameters(self) -> int:
        """Weights in it."""
        return sum(matrix.parameters for matrix in self.matrices)


def parse_size(text: str) -> int:
    """Bytes of a size such as `60MB` or `1.5 GiB`.

    Raises:
        ValueError: it is not of that form.
    """
    match = SIZE.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is no size; write it like 60MB, 1.5GB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def units(
    architecture: Architecture,
    matrices: Iterable[Matrix],
    schemes: Sequence[WeightScheme],
    *,
    tie: bool,
) -> tuple[Unit, ...]:
    """Group matrices and price their grids; grids whose groups do not divide are left out.

    Args:
        architecture: says how scales are stored.
        matrices: those to be rounded, in model order.
        schemes: grids to choose from.
        tie: give one grid to what engines fuse.
    """
    groups: dict[tuple[object, ...], list[Matrix]] = {}
    for matrix in matrices:
        fused = next((roles for roles in FUSED if tie and matrix.role in roles), matrix.name)
        groups.setdefault((matrix.block, matrix.expert, fused), []).append(matrix)
    return tuple(_unit(architecture, members, schemes) for members in groups.values())


def _unit(
    architecture: Architecture, members: Sequence[Matrix], schemes: Sequence[WeightScheme]
) -> Unit:
    fitting = tuple(s for s in schemes if all(_divides(s, matrix) for matrix in members))
    stored = STORED[architecture.dtype]
    costs = tuple(
        sum(packed_bytes(matrix.shape, scheme, stored).total for matrix in members)
        for scheme in fitting
    )
    return Unit(tuple(members), fitting, costs)


def _divides(scheme: WeightScheme, matrix: Matrix) -> bool:
    return scheme.group_size is None or matrix.shape[1] % scheme.group_size == 0


def dense_bytes(architecture: Architecture, found: Sequence[Unit]) -> int:
    """Bytes of every tensor that no unit holds, embedding and head among them."""
    return architecture.bytes - sum(unit.parameters for unit in found) * architecture.dtype_bytes


def proxy(found: Sequence[Unit], budget: int) -> tuple[int, ...]:
    """A choice within the budget that knows nothing of weights or text: for the plan's prices.

    Every weight counts alike, and a bit more divides its error by four. Greedy by gain per byte.

    Args:
        found: units, the cheapest grids of which fit the budget.
        budget: bytes for all of them.
    """
    ordered = [sorted(range(len(unit.costs)), key=unit.costs.__getitem__) for unit in found]
    place = [0] * len(found)
    left = budget - sum(unit.costs[order[0]] for unit, order in zip(found, ordered, strict=True))
    steps: list[tuple[float, int, int]] = []

    def offer(index: int) -> None:
        unit, order = found[index], ordered[index]
        now = order[place[index]]
        for later in range(place[index] + 1, len(order)):
            extra = unit.costs[order[later]] - unit.costs[now]
            gain = _proxy_loss(unit, now) - _proxy_loss(unit, order[later])
            if extra > 0 and gain > 0:
                heapq.heappush(steps, (-gain / extra, index, later))

    for index in range(len(found)):
        offer(index)
    while steps:
        _, index, later = heapq.heappop(steps)
        unit, order = found[index], ordered[index]
        extra = unit.costs[order[later]] - unit.costs[order[place[index]]]
        if later > place[index] and extra <= left:
            place[index] = later
            left -= extra
            offer(index)
    return tuple(order[k] for order, k in zip(ordered, place, strict=True))


def _proxy_loss(unit: Unit, place: int) -> float:
    scheme = unit.schemes[place]
    spread = 1.0 if scheme.group_size is None else scheme.group_size / (scheme.group_size + 64)
    return float(unit.parameters * 4.0**-scheme.bits * spread)
