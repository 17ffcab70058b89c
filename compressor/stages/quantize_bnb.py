"""`quantize.bnb`: the formats of bitsandbytes, NF4 and LLM.int8, as that library rounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import ReportProblem, StageConfig, option, patterns_option
from compressor.stages.quantize_base import checked_choice
from compressor.types import ActivationScheme, WeightScheme

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_BLOCK = 64


class QuantizeBnb(StageConfig):
    """What `load_in_4bit` and `load_in_8bit` of transformers do, done once and measured."""

    source: ClassVar[str] = "QLoRA, arXiv:2305.14314; LLM.int8, arXiv:2208.07339; bitsandbytes"

    rounds_weights: ClassVar[bool] = True

    method: Literal["quantize.bnb"] = "quantize.bnb"
    bits: Literal[4, 8] = option(
        4,
        "Width of one code: 4 for NF4, sixteen quantiles of a Gaussian; 8 for LLM.int8, integers "
        "by output channel, beside inputs rounded to 8 bits.",
        effect="NF4 is the format that QLoRA adapters are trained on. Only bitsandbytes reads "
        "either: export `bitsandbytes`.",
    )
    group_size: Literal[32, 64, 128, 256, 512] = option(
        _BLOCK,
        "Inputs of NF4 that share one scale, their largest magnitude; the block of bitsandbytes.",
        effect="Costs 32/group_size bits per weight: 4.5 bits at 64. Must divide the inputs of "
        "every target. LLM.int8 has one scale for each output channel.",
        source="QLoRA, section 4",
    )
    threshold: float = option(
        6.0,
        "Of LLM.int8: a column of inputs that holds one of this magnitude is not rounded; 0 "
        "rounds all of them. Which columns those are depends on the tokens that go through "
        "together.",
        effect="The smaller, the more is computed in 16 bits: slower and more accurate.",
        source="LLM.int8, section 3.2",
        ge=0,
    )
    targets: tuple[str, ...] = patterns_option(
        ("linear",),
        "Matrices to round, as in `quantize.rtn`.",
        min_length=1,
    )
    ignore: tuple[str, ...] = patterns_option(
        (),
        "Matrices to leave alone, written like `targets`; wins over them.",
    )

    @property
    def label(self) -> str:
        """`NF4 g64` or `LLM.int8`."""
        return "LLM.int8" if self.bits == 8 else f"NF4 g{self.group_size}"

    @property
    def scheme(self) -> WeightScheme:
        """The grid of every target."""
        if self.bits == 8:
            return WeightScheme(8, None, number="absmax")
        return WeightScheme(4, self.group_size, number="nf4")

    @property
    def width_multiple(self) -> int:
        """Blocks of NF4 must divide the inputs of matrices."""
        return self.scheme.group_size or 1

    def schemes(self, architecture: Architecture) -> dict[str, WeightScheme]:
        """The grid of every matrix that the stage rounds, by name, in model order."""
        chosen = {matrix.name for matrix in architecture.select(self.targets).matrices}
        chosen -= {matrix.name for matrix in architecture.select(self.ignore).matrices}
        names = (matrix.name for matrix in architecture.matrices if matrix.name in chosen)
        return dict.fromkeys(names, self.scheme)

    def rounded_inputs(self, architecture: Architecture) -> dict[str, ActivationScheme]:
        """How the inputs of matrices are rounded while the model runs; NF4 leaves them."""
        if self.bits == 4:
            return {}
        scheme = ActivationScheme("absmax", 8, threshold=self.threshold)
        return dict.fromkeys(self.schemes(architecture), scheme)

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """The architecture with codes of bitsandbytes on every chosen matrix."""
        schemes = self.schemes(architecture)
        hint = "use the pattern `linear`; bitsandbytes keeps the embedding and the head"
        chosen = checked_choice(self, schemes, architecture, problems, hint)
        if not chosen:
            return architecture
        self._check_matrices(chosen, problems)
        if any(matrix.allotted for matrix in architecture.matrices):
            message = "allocate.bits chooses integer grids, which bitsandbytes does not have"
            problems("method", message, "round with quantize.gptq or quantize.rtn")
        self._check_options(problems)
        architecture = architecture.with_scheme(list(schemes), self.scheme)
        return architecture.with_activations(self.rounded_inputs(architecture))

    def _check_options(self, problems: ReportProblem) -> None:
        """What is written must mean something for the format."""
        if self.bits == 4 and self.threshold != type(self).model_fields["threshold"].default:
            message = "NF4 leaves inputs as they are, so this has no effect"
            problems("threshold", message, "remove `threshold`, or write `bits: 8`")
        if self.bits == 8 and self.group_size != _BLOCK:
            message = "LLM.int8 has one scale for each output channel, so this has no effect"
            problems("group_size", message, "remove `group_size`, or write `bits: 4`")

    def _check_matrices(self, chosen: Sequence[Matrix], problems: ReportProblem) -> None:
        """What the library converts is an ordinary linear layer with whole blocks in its rows."""
        size = self.width_multiple
        kinds = {
            "a fused expert": [m for m in chosen if m.expert is not None],
            "a Conv1D, stored the other way round": [m for m in chosen if m.transposed_on_disk],
        }
        for kind, matrices in kinds.items():
            if matrices:
                message = f"{matrices[0].name} is {kind}, which bitsandbytes leaves as it is"
                problems("targets", message, "use quantize.rtn or quantize.gptq for this model")
        if bad := [matrix for matrix in chosen if matrix.shape[1] % size]:
            more = f" (and {len(bad) - 1} more matrices)" if len(bad) > 1 else ""
            inputs = f"the {bad[0].shape[1]} inputs of {bad[0].name}{more}"
            hint = "take smaller blocks, or leave them out with `ignore`"
            problems("group_size", f"blocks of {size} do not divide {inputs}", hint)

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """That scores see rounded inputs."""
        rounded = self.rounded_inputs(before)
        if not rounded:
            return ()
        return (
            f"the inputs of {len(rounded)} matrices are rounded to 8 bits, token by token, but for "
            "columns with outliers; scores are taken with that rounding",
        )

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Round every target; no text is read."""
        from compressor.stages.rounding import round_model
        from compressor.stages.solving import nearest

        del calibration
        return round_model(self, nearest("minmax"), checkpoint, (), context)
