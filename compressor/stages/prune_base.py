"""Options and checks that every pruning method shares: how much goes, and what that leaves."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal, Self

from pydantic import Field

from compressor.errors import ModelError
from compressor.model.shape import Fault, FreeSize, Shape, faults, fitted, resized, shape_of
from compressor.stages.base import ReportProblem, StageConfig, option

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture

BUDGETS = ("ratio", "parameters", "bytes")
_WIDTH = 8  # what products of matrices on today's machines like at least


class PruneConfig(StageConfig):
    """Options common to the methods that make a model smaller."""

    ratio: float | None = option(
        None,
        "Share of all parameters, embedding included, that goes; the nearest legal size is taken.",
        effect="0.2 without training costs small models much: let `recover.distill` follow.",
        ge=0,
        lt=1,
    )
    parameters: int | None = option(
        None,
        "Parameters that may be left, ties counted once; in place of `ratio`.",
        ge=1,
    )
    bytes: int | None = option(
        None,
        "Bytes that the model's tensors may take in its own dtype; in place of `ratio`.",
        ge=1,
    )

    def target(self, architecture: Architecture) -> Shape:
        """The sizes that the stage leaves.

        Raises:
            ModelError: the budget cannot be met.
        """
        shape, size = self.fixed(architecture), self.free_size
        budget = self.budget(architecture)
        if budget is None:
            return shape
        at_most = self.ratio is None
        multiple = self.free_multiple
        return fitted(architecture, shape, size, budget, multiple=multiple, at_most=at_most)

    def budget(self, architecture: Architecture) -> int | None:
        """Parameters that may be left; None when sizes are given instead."""
        if self.ratio is not None:
            return round(architecture.parameters * (1 - self.ratio))
        if self.bytes is not None:
            return self.bytes // architecture.dtype_bytes
        return self.parameters

    @abstractmethod
    def fixed(self, architecture: Architecture) -> Shape:
        """The present sizes with those replaced that options name."""

    @property
    @abstractmethod
    def free_size(self) -> FreeSize:
        """The size that a budget decides."""

    @property
    def free_multiple(self) -> int:
        """What that size is a multiple of."""
        return 1

    @property
    @abstractmethod
    def sizes(self) -> dict[str, str]:
        """The option that names a size, by the size's name in `Shape`."""

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The smaller architecture; refuses sizes that the model or its class cannot have."""
        if found := list(self._faults(architecture)):
            for name, message, hint in found:
                problems(name, message, hint)
            return architecture
        return resized(architecture, self.target(architecture))

    def _faults(self, architecture: Architecture) -> Iterator[tuple[str, str, str]]:
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        named = [name for name in self.sizes.values() if getattr(self, name) is not None]
        if len(given) > 1:
            message = f"{given[0]} and {given[1]} both say how much is left"
            yield given[1], message, "write one of them"
            return
        if not given and not named:
            names = ", ".join([*BUDGETS, *self.sizes.values()])
            yield "method", "nothing says how much goes", f"write one of: {names}"
            return
        free = self.sizes[self.free_size]
        if given and free in named:
            message = f"{given[0]} decides {free}, which is given too"
            yield free, message, "write one of them"
            return
        yield from self._size_faults(architecture, given[0] if given else "method")

    def _size_faults(
        self, architecture: Architecture, asked: str
    ) -> Iterator[tuple[str, str, str]]:
        found = [*faults(architecture, self.fixed(architecture)), *self.unsuited(architecture)]
        if found:
            yield from ((self.sizes.get(f.size, asked), f.message, f.hint) for f in found)
            return
        try:
            shape = self.target(architecture)
        except ModelError as error:
            yield asked, error.message, error.hint or "ask for more, or prune something else too"
            return
        for fault in faults(architecture, shape):
            place = self.sizes.get(fault.size, asked)
            yield (place if place and getattr(self, place) else asked), fault.message, fault.hint

    def unsuited(self, architecture: Architecture) -> Iterator[Fault]:
        """Why the method itself cannot work on the model."""
        del architecture
        yield from ()

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What goes, and the share of all parameters and of those in blocks."""
        try:
            shape = self.target(before)
        except ModelError:
            return ()
        after, now = resized(before, shape), shape_of(before)
        words = {"layers": "blocks", "kv_heads": "key-value heads", "heads": "query heads"}
        words |= {"channels": "channels", "experts": "experts"}
        words |= {"hidden": "channels of the residual stream"}
        goes = [
            f"{getattr(now, size) - left} of {getattr(now, size)} {word}"
            for size, word in words.items()
            if (left := getattr(shape, size)) != getattr(now, size)
        ]
        gone = before.parameters - after.parameters
        inside = sum(matrix.parameters for matrix in before.matrices if matrix.block is not None)
        return (
            f"removes {', '.join(goes) or 'nothing'}: {before.parameters / 1e6:.1f}M to "
            f"{after.parameters / 1e6:.1f}M parameters, -{gone / before.parameters:.1%} of all and "
            f"-{gone / inside:.1%} of those in blocks",
        )


class MultipleConfig(PruneConfig):
    """Options of the methods that make matrices narrower."""

    multiple: Literal["auto"] | Annotated[int, Field(ge=1)] = option(
        "auto",
        "The number of channels is a multiple of this; `auto` takes 8 and the group sizes of the "
        "rounders that follow in the recipe.",
        effect="GGUF's K-quants need 256, most kernels 64 or 128.",
    )

    @property
    def width_multiple(self) -> int:
        """As asked for."""
        return _WIDTH if self.multiple == "auto" else self.multiple

    def before(self, later: Sequence[StageConfig]) -> Self:
        """With `multiple` settled by what follows."""
        if self.multiple != "auto":
            return self
        needed = math.lcm(_WIDTH, *(stage.width_multiple for stage in later))
        return self.model_copy(update={"multiple": needed})

    @property
    def free_multiple(self) -> int:
        """As `multiple` says."""
        return self.width_multiple

    def uneven(
        self, size: str, asked: int | None, now: int, step: int | None = None
    ) -> Iterator[Fault]:
        """A number of channels that is no multiple, unless all stay; what would do is one of step.

        Args:
            size: its name in `Shape`.
            asked: channels that are to be left; None where a budget decides.
            now: channels at present.
            step: multiple to name in its place; by default that of the stage.
        """
        step = step or self.width_multiple
        if asked and asked != now and asked % self.width_multiple:
            yield Fault(
                size,
                f"{asked} channels are no multiple of {self.width_multiple}, which "
                "`multiple` or a rounder after it asks for",
                f"write {asked // step * step or now}",
            )


class WidthConfig(MultipleConfig):
    """Options of the methods that make blocks narrower."""

    intermediate: int | None = option(
        None,
        "Channels that are left in every feed-forward half, or in every expert.",
        effect="By default decided by `ratio`, `parameters` or `bytes`.",
        ge=1,
    )
    heads: int | None = option(
        None,
        "Query heads that are left in every block, a multiple of the key-value heads that are "
        "left.",
        effect="By default as many for every key-value head as before. Attention suffers more "
        "than the feed-forward half.",
        ge=1,
    )
    kv_heads: int | None = option(
        None,
        "Key-value heads that are left in every block, each with all or some of its query heads.",
        effect="Makes the cache smaller in proportion. Default: all.",
        ge=1,
    )

    @property
    def sizes(self) -> dict[str, str]:
        """Channels, heads and key-value heads."""
        return {"channels": "intermediate", "heads": "heads", "kv_heads": "kv_heads"}

    @property
    def free_size(self) -> FreeSize:
        """Channels: the feed-forward half tolerates most."""
        return "channels"

    def fixed(self, architecture: Architecture) -> Shape:
        """With the heads and channels that options name."""
        now = shape_of(architecture)
        kv_heads = self.kv_heads or now.kv_heads
        heads = self.heads or now.heads // now.kv_heads * kv_heads
        channels = self.intermediate or now.channels
        return replace(now, kv_heads=kv_heads, heads=heads, channels=channels)

    def unsuited(self, architecture: Architecture) -> Iterator[Fault]:
        """Channels that are no multiple."""
        yield from self.uneven("channels", self.intermediate, shape_of(architecture).channels)
