"""What grids cost in bytes, which matrices must share one, and what a budget leaves for them.

Pure arithmetic on an architecture, so that the plan can refuse a budget without weights.
"""

from __future__ import annotations

import heapq
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from compressor.formats.capabilities import Container
from compressor.model.architecture import Architecture
from compressor.model.matrices import Matrix
from compressor.stages.packing import fits, matrix_bytes
from compressor.types import WeightScheme

_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|kB|MB|GB|KiB|MiB|GiB)")


@dataclass(frozen=True)
class Unit:
    """Matrices that get one grid together.

    Attributes:
        matrices: one, or those that an engine fuses.
        schemes: grids to choose from, which all of them can have; None leaves them dense.
        costs: bytes of all the matrices in the deliverable on each of the grids.
    """

    matrices: tuple[Matrix, ...]
    schemes: tuple[WeightScheme | None, ...]
    costs: tuple[int, ...]

    @property
    def grids(self) -> tuple[WeightScheme, ...]:
        """The choices without staying dense."""
        return tuple(scheme for scheme in self.schemes if scheme is not None)

    @property
    def may_stay_dense(self) -> bool:
        """Whether no grid at all is among the choices."""
        return None in self.schemes

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


def priced(
    architecture: Architecture,
    members: Sequence[Matrix],
    schemes: Sequence[WeightScheme | None],
    container: Container,
) -> Unit:
    """A unit with the grids that all of its matrices can have in the container, and their bytes.

    Args:
        architecture: says how scales are stored.
        members: matrices that get one grid.
        schemes: grids to choose from.
        container: what the deliverable is.
    """
    fitting = tuple(s for s in schemes if all(fits(matrix, s, container) for matrix in members))
    costs = tuple(
        sum(matrix_bytes(matrix, scheme, architecture, container) for matrix in members)
        for scheme in fitting
    )
    return Unit(tuple(members), fitting, costs)


def dense_bytes(architecture: Architecture, found: Sequence[Unit], container: Container) -> int:
    """Bytes of every tensor that no unit holds; GGUF keeps norms and biases in fp32."""
    rest = architecture.bytes - sum(unit.parameters for unit in found) * architecture.dtype_bytes
    if container != "gguf":
        return rest
    small = sum(math.prod(shape) for _, shape in architecture.others)
    return rest + small * (4 - architecture.dtype_bytes)


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
    if scheme is None:
        return 0.0
    spread = 1.0 if scheme.group_size is None else scheme.group_size / (scheme.group_size + 64)
    return float(unit.parameters * 4.0**-scheme.bits * spread)
