"""Options and checks of the transforms that scale inputs of matrices."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable

from compressor.model.architecture import Architecture
from compressor.model.edges import EdgeKind, missing
from compressor.stages.base import ReportProblem, StageConfig


class ScalingConfig(StageConfig):
    """A transform that moves scales over edges; see `compressor.model.edges`."""

    @abstractmethod
    def edge_kinds(self, architecture: Architecture) -> tuple[EdgeKind, ...]:
        """The kinds of edges to scale on this model."""


def require_edges(
    architecture: Architecture,
    kinds: Iterable[EdgeKind],
    option: str,
    hint: str,
    problems: ReportProblem,
) -> None:
    """Report every edge that was asked for and that the family does not have."""
    for kind in kinds:
        if reason := missing(architecture, kind):
            problems(option, f"there is no {kind} edge: {reason}", hint)
