"""`transform.awq`: scale inputs so that the weights that matter are rounded finely."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from compressor.model.edges import EDGE_KINDS, NORM_EDGES, EdgeKind, edges, missing
from compressor.stages.base import Need, ReportProblem, StageConfig, option
from compressor.stages.quantize_base import GroupSize
from compressor.stages.transform_base import ScalingConfig, require_edges
from compressor.types import Symmetry, WeightScheme

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_COARSE = 4  # bits whose errors stand far above those of bf16 arithmetic, so that it can judge them


class TransformAwq(ScalingConfig):
    """AWQ: the function stays the same, the weights round better. A rounder must follow."""

    source: ClassVar[str] = "Lin et al. 2023, AWQ, arXiv:2306.00978"

    method: Literal["transform.awq"] = "transform.awq"
    bits: int = option(
        4,
        "Width of one code that the scales are chosen for; that of the rounder after it where this "
        "is left out.",
        ge=2,
        le=8,
    )
    group_size: GroupSize = option(
        128,
        "Inputs that share one scale of the grid, or `channel`; the rounder's where left out.",
    )
    symmetry: Symmetry = option(
        "symmetric",
        "Where the grid lies; as in `quantize.rtn`, and as in the rounder where left out.",
    )
    grid: Literal["minmax", "mse", "imatrix"] = option(
        "imatrix",
        "How the grid is fitted for every scale that is tried.",
        effect="Write what the rounder after it uses, `imatrix` for its `obs`: scales searched for "
        "`minmax` grids, as AWQ was published, made an imatrix grid worse than no scales. `minmax` "
        "is the fastest.",
        source="measured on builtin:tiny at 3 bits; see LOG.md",
    )
    steps: int = option(
        10,
        "Exponents between 0 and 1 that are tried.",
        effect="More is finer and slower; 20, as published, was no better at 3 bits.",
        source="AWQ, section 4.2; measured on builtin:tiny, see LOG.md",
        ge=2,
        le=200,
    )
    weights: Literal["ignore", "use", "both"] = option(
        "both",
        "Whether scales also depend on the weights: `ignore` tries powers of the mean input, `use` "
        "in addition divides them by powers of the mean weight, `both` tries either.",
        effect="`both` finds the lowest error and takes twice as long.",
        source="`duo_scaling` of llm-compressor and AutoAWQ",
    )
    edges: Literal["all"] | tuple[EdgeKind, ...] = option(
        "all",
        "Where to scale: `norm_attention` (norm to q, k, v), `value_output` (v to o), `norm_mlp` "
        "(norm to gate and up, or the first matrix), `up_down` (up to down), or `all` that the "
        "family has.",
        effect="Scaled only where that lowers the error; an edge that the family lacks is refused.",
    )
    tokens: int = option(
        4096,
        "Tokens of calibration text on which outputs of attention and feed-forward halves are "
        "compared, in whole rows spread evenly over the text. Mean inputs, and errors of o and "
        "down, are measured on all of the text.",
        effect="More is slower and steadier.",
        ge=1,
    )

    @property
    def label(self) -> str:
        """Such as `AWQ scales for W4 g64`."""
        group = "channel" if self.group_size == "channel" else f"g{self.group_size}"
        return f"AWQ scales for W{self.bits} {group}"

    @property
    def scheme(self) -> WeightScheme:
        """The grid that the scales are chosen for."""
        group = None if self.group_size == "channel" else self.group_size
        return WeightScheme(self.bits, group, self.symmetry)

    def foretells(self, rounder: StageConfig) -> dict[str, Any]:
        """The grid."""
        names = ("bits", "group_size", "symmetry")
        return {name: getattr(rounder, name) for name in names if hasattr(rounder, name)}

    def edge_kinds(self, architecture: Architecture) -> tuple[EdgeKind, ...]:
        """What `edges` names, or everything that the family has."""
        return _available(architecture) if self.edges == "all" else self.edges

    def calibration_need(self) -> Need | None:
        """Scales follow the inputs, always."""
        return Need("method", "transform.awq measures the inputs of layers on calibration text")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The same architecture; refuses edges the family lacks and groups that do not divide."""
        works = _available(architecture)
        hint = f"write `edges: [{', '.join(works)}]`" if works else ""
        if self.edges != "all":
            require_edges(architecture, self.edges, "edges", hint, problems)
        elif not set(works) & set(NORM_EDGES):
            require_edges(architecture, NORM_EDGES[:1], "method", hint, problems)
        self._check_groups(architecture, problems)
        return architecture

    def _check_groups(self, architecture: Architecture, problems: ReportProblem) -> None:
        if self.group_size == "channel":
            return
        kinds = self.edge_kinds(architecture)
        readers = {
            reader.shape[1]: reader.name
            for block in range(architecture.layers)
            for edge in edges(architecture, block)
            for reader in edge.readers
            if edge.kind in kinds and reader.shape[1] % self.group_size
        }
        for width, name in readers.items():
            message = f"groups of {self.group_size} do not divide the {width} inputs of {name}"
            problems("group_size", message, "write the group size of the rounder, or `channel`")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Choose and fold scales block by block, on the inputs of the model as it is."""
        from compressor.model.precision import calibration_dtype
        from compressor.stages.scale_search import AwqChooser
        from compressor.stages.scaling import scale_model

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        precision = "auto" if self.bits <= _COARSE else "fp32"
        dtype = calibration_dtype(precision, checkpoint, context.device)
        context = replace(context, dtype=dtype)
        return scale_model(self, AwqChooser(self), checkpoint, calibration.batches, context)


def _available(architecture: Architecture) -> tuple[EdgeKind, ...]:
    """The kinds of edges that the family has."""
    return tuple(kind for kind in EDGE_KINDS if not missing(architecture, kind))
