"""What exporters are told about the matrices of an architecture, and what these weigh packed."""

from __future__ import annotations

from dataclasses import replace

from compressor.formats.capabilities import Container
from compressor.formats.exchange import GGUF_BLOCK, gguf_type, repeated_scales, stored_bytes
from compressor.formats.sizes import STORED
from compressor.formats.support import SCALED_EMBEDDINGS, Target
from compressor.model.architecture import Architecture
from compressor.model.matrices import Matrix
from compressor.types import WeightScheme


def target_of(matrix: Matrix, architecture: Architecture) -> Target:
    """The matrix as an export sees it."""
    scaled = matrix.role == "embed" and architecture.model_type in SCALED_EMBEDDINGS
    return Target(
        matrix.name,
        matrix.shape,
        matrix.kind,
        matrix.scheme,
        matrix.activations,
        scaled,
        matrix.rounding,
    )


def targets_of(architecture: Architecture) -> list[Target]:
    """Every matrix as an export sees it; tables of positions always stay dense."""
    return [
        target_of(matrix, architecture)
        for matrix in architecture.matrices
        if matrix.role != "position"
    ]


def matrix_bytes(
    matrix: Matrix, scheme: WeightScheme | None, architecture: Architecture, container: Container
) -> int:
    """Exact bytes of a matrix on a grid, with the scales that a tied head repeats.

    Args:
        matrix: of the architecture.
        scheme: its grid; None while dense.
        architecture: says how scales are stored, and whether the head is tied.
        container: what holds it.
    """
    if scheme is None:
        return matrix.parameters * architecture.dtype_bytes
    target, dtype = (
        target_of(replace(matrix, scheme=scheme), architecture),
        STORED[architecture.dtype],
    )
    repeated = repeated_scales(target, dtype, container) if architecture.tied else 0
    return stored_bytes(target, dtype, container).total + repeated


def fits(matrix: Matrix, scheme: WeightScheme | None, container: Container) -> bool:
    """Whether a container can hold the matrix on this grid at all.

    Args:
        matrix: whose width groups must divide.
        scheme: its grid; None, dense, always fits.
        container: GGUF has blocks of 32 inputs and few kinds of them.
    """
    if scheme is None:
        return True
    size = scheme.group_size or matrix.shape[1]
    if container == "gguf" and (size % GGUF_BLOCK or gguf_type(scheme) is None):
        return False
    return matrix.shape[1] % size == 0
