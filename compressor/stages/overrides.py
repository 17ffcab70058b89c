"""Exceptions to a rounder's grid, by pattern: more bits for `down`, smaller groups for block 0."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, model_validator

from compressor.section import Section
from compressor.types import Symmetry, WeightScheme

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture

GroupSize = Literal["channel"] | Annotated[int, Field(ge=16)]


class Override(Section):
    """Another grid for some of the matrices that a stage rounds."""

    pattern: str = Field(
        description="Matrices that it is for, written like an entry of `targets`; of those, only "
        "what the stage rounds.",
    )
    bits: int | None = Field(
        default=None, description="Width of one code; empty keeps that of the stage.", ge=2, le=8
    )
    group_size: GroupSize | None = Field(
        default=None,
        description="Inputs that share one scale, or `channel`; empty keeps that of the stage.",
    )
    symmetry: Symmetry | None = Field(
        default=None, description="Where the grid lies; empty keeps that of the stage."
    )

    @model_validator(mode="after")
    def _changes_something(self) -> Override:
        if self.bits is None and self.group_size is None and self.symmetry is None:
            raise ValueError("an override needs `bits`, `group_size` or `symmetry`")
        return self

    @property
    def keys(self) -> frozenset[str]:
        """What it sets of a grid."""
        return frozenset(self.model_dump(exclude={"pattern"}, exclude_none=True))

    def applied(self, scheme: WeightScheme) -> WeightScheme:
        """The grid with what is written here in place of its own."""
        size = self.group_size
        return replace(
            scheme,
            bits=scheme.bits if self.bits is None else self.bits,
            group_size=scheme.group_size if size is None else group_of(size),
            symmetry=self.symmetry or scheme.symmetry,
        )

    def names(self, architecture: Architecture) -> frozenset[str]:
        """Names of the matrices that the pattern matches."""
        return frozenset(matrix.name for matrix in architecture.select((self.pattern,)).matrices)


def group_of(size: GroupSize) -> int | None:
    """As `WeightScheme.group_size` has it: None for `channel`."""
    return None if size == "channel" else size


def is_idle(
    index: int, overrides: tuple[Override, ...], names: frozenset[str], architecture: Architecture
) -> bool:
    """Whether later overrides replace all that one sets, on every matrix that it is for.

    Args:
        index: of the override.
        overrides: as written.
        names: of the matrices that it matches and the stage rounds.
        architecture: whose names the patterns are matched against.
    """
    left = dict.fromkeys(names, overrides[index].keys)
    for later in overrides[index + 1 :]:
        for name in later.names(architecture) & names:
            left[name] -= later.keys
    return not any(left.values())


def overridden(
    schemes: dict[str, WeightScheme], overrides: tuple[Override, ...], architecture: Architecture
) -> dict[str, WeightScheme]:
    """The grids after all overrides, applied in their order, so that a later one wins.

    Args:
        schemes: grid of every matrix that the stage rounds, by name.
        overrides: as written.
        architecture: whose names the patterns are matched against.
    """
    for override in overrides:
        matched = override.names(architecture)
        schemes = {
            name: override.applied(scheme) if name in matched else scheme
            for name, scheme in schemes.items()
        }
    return schemes
