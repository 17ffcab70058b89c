"""`quantize.autoround`: learn for every weight which way to round, block by block."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import Need, ReportProblem, option
from compressor.stages.grids import READ_TEXT, check_grid
from compressor.stages.quantize_base import RounderConfig
from compressor.types import WeightScheme

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_BACKWARD = 2  # a backward pass costs twice the forward pass
_RATE_FROM_GPTQ = 1 / 200
_PLANNED_BATCH = 8 * 512  # tokens; the plan does not see how batches are cut


def _integers(scheme: WeightScheme) -> WeightScheme:
    """The plain integer grid of that width, group and symmetry."""
    return WeightScheme(scheme.bits, scheme.group_size, scheme.symmetry)


class QuantizeAutoround(RounderConfig):
    """Learned rounding: the block's output on calibration text decides, not the single layer's."""

    source: ClassVar[str] = "Cheng et al. 2023, SignRound (AutoRound), arXiv:2309.05516"

    runs_parent: ClassVar[bool] = True

    method: Literal["quantize.autoround"] = "quantize.autoround"
    grid: Literal["minmax", "mse", "imatrix", "neuqi", "clip", "gptq"] = option(
        "mse",
        "The grid to begin with, as in `quantize.rtn`; its range is learned from there. `gptq` "
        "takes the grid and the codes of `quantize.gptq` with its defaults: learning begins where "
        "compensation ends.",
        effect="A searched grid matters most at 2 bits, where min-max is far from usable.",
        source="AutoRound V2; LOG.md, learned rounding",
    )
    steps: int = option(
        200,
        "Steps of signed gradient descent per block, each on one batch of calibration text.",
        effect="The time of the stage is proportional.",
        source="AutoRound's default",
        ge=1,
        le=10_000,
    )
    rate: float | None = option(
        None,
        "First learning rate of offsets (in codes) and clips (as a factor); falls to 0 linearly.",
        effect="By default 1/steps, with which no offset can move beyond half a code; 2/steps for "
        "3 bits and fewer with 1000 steps and more. From the codes of GPTQ at most 1/200: larger "
        "steps undo more than they learn.",
        source="SignRound, section 3.3; AutoRound's settings for 2 bits",
        gt=0,
        le=1,
    )
    checks: int = option(
        4,
        "How often, evenly over the steps, the block's error on the whole calibration text is "
        "measured; the best state is kept.",
        effect="Each check costs a forward pass of all calibration text.",
        ge=1,
    )
    precision: Literal["auto", "float32"] = option(
        "auto",
        "Precision in which calibration text runs through the blocks, forward and backward; as in "
        "`quantize.gptq`.",
        effect="What is learned is kept in fp32 either way.",
    )
    seed: int = option(0, "Of the order in which batches are taken.", ge=0)

    @property
    def label(self) -> str:
        """Such as `AutoRound W2 g64`."""
        return super().label.replace("AUTOROUND", "AutoRound")

    @property
    def first_rate(self) -> float:
        """The rate of the first step."""
        if self.rate is not None:
            return self.rate
        default = (2 if self.bits <= 3 and self.steps >= 1000 else 1) / self.steps
        return min(default, _RATE_FROM_GPTQ) if self.grid == "gptq" else default

    def calibration_need(self) -> Need | None:
        """Rounding is learned on the activations of calibration text."""
        return Need("method", "quantize.autoround learns on the activations of calibration text")

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """Refuses float grids, and a start that does not suit the grid."""
        schemes = self.schemes(architecture)
        check_grid(self.grid, schemes, problems)
        if any(scheme != _integers(scheme) for scheme in schemes.values()):
            problems(
                "method",
                "rounding is learned between neighbouring integers, on plain integer grids only",
                "use quantize.gptq or quantize.rtn for this grid",
            )
        return super().plan(architecture, problems)

    def operations(self, after: Architecture, tokens: int, plain: float) -> float:
        """Beside plain rounding: `steps` forward and backward passes of a batch, and the checks."""
        batch = min(tokens, _PLANNED_BATCH)
        weights = sum(matrix.parameters for matrix in after.matrices if matrix.block is not None)
        passes = self.steps * batch * (1 + _BACKWARD) + (self.checks + 1) * tokens
        before = plain if self.grid in (*READ_TEXT, "gptq") else 0.0  # forwards and moments
        return before + plain + 2.0 * weights * passes

    def working_memory(self, after: Architecture, tokens: int) -> int:
        """A block's offsets, their gradients, the best state and the weights made of them in fp32;
        what backward needs of one batch: some 20 hidden and 5 inner vectors a token, in fp32.
        """
        weights = max(sum(m.parameters for m in after.block(i)) for i in range(after.layers))
        inner = max(max(m.shape) for m in after.matrices if m.block is not None)
        batch = min(tokens, _PLANNED_BATCH)
        ends = 8 * weights if self.grid == "gptq" else 0  # how far every offset may go
        return ends + 20 * weights + 4 * batch * (20 * after.hidden + 5 * inner)

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Learn the rounding of every block on inputs from the blocks rounded before it."""
        from compressor.model.precision import calibration_dtype
        from compressor.stages.learning import learned
        from compressor.stages.rounding import round_model
        from compressor.stages.solving import nearest

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        dtype = calibration_dtype(self.precision, checkpoint, context.device)
        return round_model(
            self,
            nearest("mse"),
            checkpoint,
            calibration.batches,
            replace(context, dtype=dtype),
            reference=True,
            rounds=learned(self),
        )
