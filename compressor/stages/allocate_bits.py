"""`allocate.bits`: bits for every matrix such that the model loses least within a budget."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from compressor.formats.support import loads_beside_others
from compressor.stages.base import Need, ReportProblem, StageConfig, option, patterns_option
from compressor.stages.budget import Unit, dense_bytes, parse_size, priced, proxy
from compressor.stages.overrides import GroupSize, group_of
from compressor.stages.packing import target_of
from compressor.types import Symmetry, WeightScheme

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.formats.capabilities import Container
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

Bits = Annotated[int, Field(ge=2, le=8)]

FUSED = (("q", "k", "v"), ("gate", "up"))
"""Roles that engines such as vLLM and SGLang merge into one matrix of one grid."""


class AllocateBits(StageConfig):
    """Mixed precision: the bits and groups of each matrix, by what its rounding costs the model.

    Measures, by one walk forward and one back over calibration text, how far rounding each matrix
    on each grid moves the predictions, and spends the bytes where they help most. Changes no
    weight; the rounder after it takes its grids from here.
    """

    source: ClassVar[str] = (
        "AutoScheme of AutoRound (budget and ties); Kronecker-factored Fisher information, "
        "arXiv:1503.05671 (losses); multiple-choice knapsack, Kellerer et al. 2004, 11.5"
    )

    chooses_grids: ClassVar[bool] = True

    method: Literal["allocate.bits"] = "allocate.bits"
    target_bpw: float | None = option(
        None,
        "Budget in bits per weight, scales and zero-points included; `counting` says of what. "
        "Either this or `target_size`.",
        effect="The result never exceeds it, and comes as close as the grids allow.",
        gt=0,
        le=32,
    )
    target_size: str | None = option(
        None,
        "Budget for all tensors of the deliverable, such as `60MB` or `1.5GiB`; tokenizer and file "
        "headers come on top.",
        effect="Embedding and head count, also where they stay dense.",
    )
    counting: Literal["checkpoint", "linear"] = option(
        "checkpoint",
        "What `target_bpw` averages over: `checkpoint`, all tensors with embedding and head; "
        "`linear`, the linear layers of the decoder blocks alone.",
        effect="The embedding of a small model in bf16 can take more than a checkpoint's whole "
        "budget; `linear` is how 3.5 bits are usually meant.",
    )
    bits: tuple[Bits, ...] = option(
        (2, 3, 4, 5, 6, 8),
        "Widths to choose from.",
        effect="Name those that your engine loads: the plan checks every one.",
        min_length=1,
    )
    group_sizes: tuple[GroupSize, ...] = option(
        (32, 64, 128),
        "Group sizes to choose from; those that do not divide a matrix are left out for it.",
        effect="Fewer make a simpler deliverable and a quicker stage.",
        min_length=1,
    )
    symmetry: Symmetry = option(
        "symmetric",
        "Where the grids lie, as in the rounders.",
    )
    targets: tuple[str, ...] = patterns_option(
        ("linear",),
        "Matrices to choose bits for, written as in the rounder, which must round them all.",
        min_length=1,
    )
    ignore: tuple[str, ...] = patterns_option(
        (),
        "Matrices to leave dense, written like `targets`; they still count.",
    )
    embeddings: Literal["keep", "allocate"] = option(
        "keep",
        "Whether the input embedding may get a grid too, or stays dense. Its losses are weighed by "
        "how frequent tokens are; the rounder rounds it to nearest.",
        effect="In small models it is a large share of the bytes. Beside other grids "
        "compressed-tensors holds it with 8 bits by channel only, GGUF with any.",
    )
    head: Literal["keep", "allocate"] = option(
        "keep",
        "The same for an output head of its own; one that is tied follows the embedding, which is "
        "then judged in both uses.",
        effect="As for `embeddings`; any grid that linear layers can have.",
    )
    fused: Literal["tie", "free"] = option(
        "tie",
        "Whether q, k and v, and gate and up, get one grid each: `tie`, or `free`.",
        effect="vLLM and SGLang merge them into one matrix and load only `tie`.",
    )
    experts: Literal["model", "block", "free"] = option(
        "model",
        "Which routed experts share one grid: all of the model, those of a block, or none but what "
        "`fused` ties.",
        effect="transformers loads experts of one grid only; vLLM wants one per block.",
    )
    container: Literal["compressed-tensors", "gguf"] = option(
        "compressed-tensors",
        "The deliverable that bytes are counted in, and whose grids are offered.",
        effect="GGUF has blocks of 32 for 4, 5 and 8 bits, so that other widths and groups cost as "
        "much as those.",
    )
    rounder: Literal["gptq", "rtn"] = option(
        "gptq",
        "How the stage after this one rounds: with compensation, or to nearest. As it does where "
        "left out.",
        effect="Compensation helps some matrices far more than others.",
    )
    damping: float = option(
        0.1,
        "Damping that compensation will use; that of quantize.gptq where left out.",
        effect="As in quantize.gptq.",
        gt=0,
        le=1,
    )
    tokens: int = option(
        8192,
        "Tokens of calibration text to measure on, in whole rows spread evenly over the text.",
        effect="More is steadier; time and space for hidden states of all blocks grow with it.",
        ge=1,
    )
    rows: int = option(
        128,
        "Rows of each matrix on which grids are tried.",
        effect="The rest is extrapolated by weight and gradient; more is slower and finer.",
        ge=1,
    )
    seed: int = option(0, "Draws the tokens whose gradients are taken.", ge=0, lt=2**63)

    @property
    def label(self) -> str:
        """Such as `allocate 3.5 bits per linear weight`."""
        if self.target_size is not None:
            return f"allocate {self.target_size}"
        return f"allocate {self.target_bpw:g} bits per {self._counts}"

    @property
    def _counts(self) -> str:
        """What a budget per weight is for."""
        linear = self.target_size is None and self.counting == "linear"
        return "linear weight" if linear else "weight"

    @field_validator("target_size")
    @classmethod
    def _is_size(cls, text: str | None) -> str | None:
        if text is not None:
            parse_size(text)
        return text

    @field_validator("bits", "group_sizes")
    @classmethod
    def _once(cls, choices: tuple[object, ...]) -> tuple[object, ...]:
        if len(set(choices)) < len(choices):
            raise ValueError("a choice is named twice")
        return choices

    @model_validator(mode="after")
    def _one_target(self) -> AllocateBits:
        if (self.target_bpw is None) == (self.target_size is None):
            raise ValueError("allocate.bits needs one budget: `target_bpw` or `target_size`")
        return self

    def foretells(self, rounder: StageConfig) -> dict[str, Any]:
        """Whether errors are made up for, and how damped."""
        plain = rounder.method in ("quantize.rtn", "quantize.hqq")
        damping = {"damping": rounder.damping} if hasattr(rounder, "damping") else {}
        return {"rounder": "rtn" if plain else "gptq", **damping}

    @property
    def choices(self) -> tuple[WeightScheme, ...]:
        """Every grid to choose from for linear layers and the head."""
        return tuple(
            WeightScheme(bits, group_of(size), self.symmetry)
            for bits in self.bits
            for size in self.group_sizes
        )

    @property
    def layout(self) -> Container:
        """What holds the deliverable."""
        return "gguf" if self.container == "gguf" else "auto"

    def calibration_need(self) -> Need | None:
        """Losses are measured on text, always."""
        return Need("method", "allocate.bits measures what rounding costs on calibration text")

    def units(self, architecture: Architecture) -> tuple[Unit, ...]:
        """What gets a grid, with the grids and their bytes; embedding and head come last."""
        ignored = {matrix.name for matrix in architecture.select(self.ignore).matrices}
        groups: dict[tuple[object, ...], list[Matrix]] = {}
        for matrix in architecture.select(self.targets).matrices:
            if matrix.name not in ignored:
                groups.setdefault(self._tie(matrix), []).append(matrix)
        tables = [m for m in self._tables(architecture) if m.name not in ignored]
        return tuple(
            priced(architecture, members, schemes, self.layout)
            for members, schemes in (
                *((members, self.choices) for members in groups.values()),
                *(([table], (None, *self.table_grids(table, architecture))) for table in tables),
            )
        )

    def _tie(self, matrix: Matrix) -> tuple[object, ...]:
        """Matrices for which this is the same get one grid."""
        if matrix.expert is not None and self.experts != "free":
            return ("experts", matrix.block if self.experts == "block" else None)
        fused = next((r for r in FUSED if self.fused == "tie" and matrix.role in r), matrix.name)
        return (matrix.block, matrix.expert, fused)

    def _tables(self, architecture: Architecture) -> tuple[Matrix, ...]:
        """Embedding and head, as far as they may be chosen."""
        asked = {"embed": self.embeddings, "head": self.head}
        return tuple(m for m in architecture.matrices if asked.get(m.role) == "allocate")

    def table_grids(self, table: Matrix, architecture: Architecture) -> tuple[WeightScheme, ...]:
        """Grids beside which the other matrices may have theirs."""
        if table.role == "head" or self.container == "gguf":
            return self.choices
        grid = WeightScheme(8, None, self.symmetry)
        alone = target_of(replace(table, scheme=grid), architecture)
        return (grid,) if loads_beside_others(alone, "auto") else ()

    def budget(self, architecture: Architecture, found: tuple[Unit, ...]) -> int:
        """Bytes for the units; what stays dense is paid already, so that this may be negative."""
        weights, dense = self._counted(architecture, found)
        if self.target_size is not None:
            return parse_size(self.target_size) - dense
        assert self.target_bpw is not None
        return int(self.target_bpw * weights / 8) - dense

    def _counted(self, architecture: Architecture, found: tuple[Unit, ...]) -> tuple[int, int]:
        """Weights that a budget per weight is for, and bytes of what stays dense and counts."""
        if self._counts == "weight":
            return architecture.parameters, dense_bytes(architecture, found, self.layout)
        inner = [matrix for matrix in architecture.matrices if matrix.block is not None]
        weights = sum(matrix.parameters for matrix in inner)
        dense = (weights - sum(unit.parameters for unit in found)) * architecture.dtype_bytes
        return weights, dense

    def alternatives(self, final: Architecture) -> Iterator[Architecture]:
        """The final model with each grid on every matrix that may get it."""
        units = [
            unit
            for unit in self.units(final)
            if unit.may_stay_dense or all(m.allotted and m.scheme for m in unit.matrices)
        ]
        for scheme in dict.fromkeys(scheme for unit in units for scheme in unit.schemes):
            names = [m.name for u in units if scheme in u.schemes for m in u.matrices]
            yield final.with_scheme(names, scheme)

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture with grids that fill the budget, as an example of those to come."""
        for name in ("targets", "ignore"):
            for missed in architecture.select(getattr(self, name)).unmatched:
                message = f"the pattern {missed.pattern!r} matches no matrix of the model"
                problems(name, message, missed.suggestion)
        found = self.units(architecture)
        if not self._check_places(architecture, found, problems):
            return architecture
        self._check_tables(architecture, problems)
        budget = self.budget(architecture, found)
        least = sum(min(unit.costs) for unit in found)
        if budget < least:
            self._refuse(architecture, found, least - budget, problems)
        chosen = proxy(found, max(budget, least))
        return architecture.with_allotment(allotment(found, chosen))

    def _check_places(
        self, architecture: Architecture, found: tuple[Unit, ...], problems: ReportProblem
    ) -> bool:
        """Whether every matrix can be measured and given a grid."""
        matrices = architecture.select(self.targets).matrices
        outside = [m.name for m in matrices if m.block is None or m.role == "router"]
        without = [unit.matrices[0] for unit in found if not unit.schemes]
        if not found:
            problems("targets", "nothing is left to choose bits for", "")
        if outside:
            message = f"{outside[0]} is no linear layer of a decoder block"
            hint = "use the pattern `linear`, and `embeddings: allocate` or `head: allocate`"
            problems("targets", message, hint)
        if without:
            first = without[0]
            message = f"no group size of the choices divides the {first.shape[1]} inputs"
            problems("group_sizes", f"{message} of {first.name}", "add one, or `channel`")
        return bool(found) and not (outside or without)

    def _check_tables(self, architecture: Architecture, problems: ReportProblem) -> None:
        """Embedding and head must count, and the deliverable must hold their grids."""
        for name in ("embeddings", "head"):
            if getattr(self, name) == "allocate" and self.counting == "linear":
                message = "with `counting: linear` it costs nothing, so that it would stay dense"
                problems(name, message, "write `counting: checkpoint`, or give a `target_size`")
        if self.head == "allocate" and architecture.tied and self.embeddings == "keep":
            message = "the head is tied to the embedding, so that it cannot be rounded alone"
            problems("head", message, "write `embeddings: allocate`, or `head: keep`")
        for table in self._tables(architecture):
            if not self.table_grids(table, architecture):
                message = "compressed-tensors holds an embedding beside other grids only with 8 "
                message += "symmetric bits by channel, and not one that scales what it looks up"
                problems("embeddings", message, "write `embeddings: keep`, or `container: gguf`")

    def _refuse(
        self,
        architecture: Architecture,
        found: tuple[Unit, ...],
        lacking: int,
        problems: ReportProblem,
    ) -> None:
        """Say by how much a budget is too small, and what takes the room."""
        weights, dense = self._counted(architecture, found)
        least = dense + sum(min(unit.costs) for unit in found)
        bits = 8 * least / weights
        hint = "raise it, offer fewer bits or larger groups"
        if self.target_bpw is not None and self.counting == "checkpoint":
            hint += ", or write `counting: linear` to leave out what stays dense"
        problems(
            "target_size" if self.target_size else "target_bpw",
            f"the smallest choice of grids is {lacking / 1e6:.2f} MB over the budget: it takes "
            f"{least / 1e6:.1f} MB ({bits:.2f} bits per {self._counts}), of which "
            f"{dense / 1e6:.1f} MB stay dense",
            hint,
        )

    def changed(self, before: Architecture, after: Architecture) -> tuple[Matrix, ...]:
        """None: only grids are chosen."""
        del before, after
        return ()

    def hidden_states(self, architecture: Architecture, tokens: int) -> int:
        """Vectors of the residual stream that are on disk at once: one per token and block."""
        return (architecture.layers + 3) * min(tokens, self.tokens)

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What there is to choose, and that the grids in the plan are an example."""
        found = self.units(before)
        matrices = sum(len(unit.matrices) for unit in found)
        unspent = self.budget(before, found) - sum(max(unit.costs) for unit in found)
        filled = "sizes in this plan fill the budget, and the run's never exceed it"
        if unspent > 0:
            filled = "the budget does not bind: with the largest grid for every matrix "
            filled += f"{unspent / 1e6:,.1f} MB of it are left"
        return (
            f"{len(self.choices)} grids to choose from for {matrices} matrices in {len(found)} "
            f"units; {filled}",
        )

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Measure, choose, and leave the choice beside an unchanged checkpoint."""
        from compressor.stages.allocating import allocate

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        return allocate(self, checkpoint, calibration.batches, context)


def allotment(found: tuple[Unit, ...], chosen: tuple[int, ...]) -> dict[str, WeightScheme]:
    """The grid of every matrix that gets one, by name, from the place of its unit's choice."""
    return {
        matrix.name: scheme
        for unit, place in zip(found, chosen, strict=True)
        if (scheme := unit.schemes[place]) is not None
        for matrix in unit.matrices
    }
