"""`prune.search`: spend a budget on blocks, heads and channels in the mix that costs least."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.errors import ModelError
from compressor.model.shape import Shape, faults, fitted, resized, shape_of
from compressor.stages.base import Need, ReportProblem, option
from compressor.stages.prune_base import BUDGETS, WidthConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult


class PruneSearch(WidthConfig):
    """Try several mixes on little text, and do the best one on all of it.

    A mix drops some blocks (`prune.depth`), narrows attention by one head a group or by one
    key-value head, and lets channels take the rest of the budget, with the compensation of
    `prune.obs` throughout. The best is the one whose predictions on development text, which neither
    calibration nor evaluation holds, stay nearest to the parent's.
    """

    source: ClassVar[str] = "ZipLM, arXiv:2302.04089, and Minitron, arXiv:2407.14679, search too"

    method: Literal["prune.search"] = "prune.search"
    depths: tuple[int, ...] | None = option(
        None,
        "Numbers of blocks that may go.",
        effect="By default none, a sixteenth, an eighth and a quarter of them, where the budget "
        "allows it. Each is a mix with every kind of attention.",
        source="LOG.md, pruning: of SmolLM2-135M a fifth is best taken as a quarter of the blocks",
    )
    attention: tuple[Literal["whole", "heads", "kv_heads"], ...] = option(
        ("whole", "heads", "kv_heads"),
        "What may go from attention: nothing, one query head of every group, or one key-value head "
        "with all of its queries.",
        effect="What a family cannot lose is not tried.",
        min_length=1,
    )
    objective: Literal["mean", "worst"] = option(
        "mean",
        "Which distance to the parent decides: the mean over domains, or that of the worst one.",
    )
    order: Literal["greedy", "influence"] = option(
        "greedy",
        "Which blocks go where some do; `score` of `prune.depth`.",
        effect="`influence` takes one pass in place of one for every block tried.",
    )
    trial_tokens: int = option(
        4096,
        "Tokens of calibration text that a mix is tried with, in whole rows.",
        effect="More is slower and steadier.",
        ge=1,
    )
    damping: float = option(0.5, "As in `prune.obs`.", gt=0, le=100)
    shrinkage: float = option(0.0, "As in `prune.obs`.", ge=0, le=1)
    propagate: float = option(0.5, "As in `prune.obs`.", ge=0, le=1)
    align: float = option(0.5, "As in `prune.obs`.", ge=0, le=1)

    @property
    def label(self) -> str:
        """Such as `Search -20 %`."""
        return "Search" if self.ratio is None else f"Search -{self.ratio:.0%}"

    @property
    def settles_shape(self) -> bool:
        """The mix is known when it is found."""
        return True

    def calibration_need(self) -> Need | None:
        """Mixes are tried on text."""
        return Need("method", "prune.search measures its Hessians on calibration text")

    def mixes(self, architecture: Architecture) -> tuple[Shape, ...]:
        """Sizes that meet the budget and that the model's class can have; channels alone first."""
        budget = self.budget(architecture)
        if budget is None:
            return ()
        found = []
        for shape in self._kinds(architecture):
            if any(faults(architecture, shape)):
                continue
            try:
                at_most, multiple = self.ratio is None, self.width_multiple
                mix = fitted(
                    architecture, shape, "channels", budget, multiple=multiple, at_most=at_most
                )
            except ModelError:
                continue
            if mix not in found:
                found.append(mix)
        return tuple(found)

    def _kinds(self, architecture: Architecture) -> Iterator[Shape]:
        now = shape_of(architecture)
        shared = now.heads // now.kv_heads
        lost = {"whole": (0, 0), "heads": (0, now.kv_heads), "kv_heads": (1, shared)}
        depths = self.depths
        if depths is None:
            parts = (max(1, round(now.layers / part)) for part in (16, 8, 4))
            depths = tuple(sorted({0, *parts}))
        for gone in depths:
            for kind in self.attention:
                kv_heads, heads = now.kv_heads - lost[kind][0], now.heads - lost[kind][1]
                fits = heads * architecture.head_dim % self.width_multiple == 0
                if heads == now.heads or fits:
                    yield replace(now, layers=now.layers - gone, kv_heads=kv_heads, heads=heads)

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture of the first mix; refuses a budget that none meets."""
        given = [name for name in BUDGETS if getattr(self, name) is not None]
        named = [name for name in self.sizes.values() if getattr(self, name) is not None]
        if len(given) != 1:
            message = f"exactly one of {', '.join(BUDGETS)} says how much goes"
            problems(given[1] if given else "method", message, "write one")
            return architecture
        if named:
            message = f"{named[0]} is what the search decides"
            problems(named[0], message, "leave it out, or use `prune.obs`")
            return architecture
        mixes = self.mixes(architecture)
        if not mixes:
            message = f"no mix of blocks, heads and channels of {architecture.family} meets this"
            problems(given[0], message, "ask for less, or for other `depths`")
            return architecture
        return resized(architecture, mixes[0])

    def target(self, architecture: Architecture) -> Shape:
        """The first mix.

        Raises:
            ModelError: there is none.
        """
        mixes = self.mixes(architecture)
        if not mixes:
            raise ModelError("no mix meets the budget")
        return mixes[0]

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """The mixes."""
        mixes = self.mixes(before)
        listed = "; ".join(
            f"{mix.layers} blocks, {mix.heads}/{mix.kv_heads} heads, {mix.channels} channels"
            for mix in mixes
        )
        return (f"tries {len(mixes)} mixes and keeps the best, sized here as the first: {listed}",)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Try every mix, then do the best one."""
        from compressor.stages.mixing import search

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        return search(self, checkpoint, calibration.batches, context)
