"""`quantize.gptq`: round one input column at a time and compensate in the columns that follow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal, Self

from pydantic import model_validator

from compressor.model.architecture import moments_held
from compressor.stages.base import Need, ReportProblem, option
from compressor.stages.grids import CompensatedSearch, check_grid
from compressor.stages.quantize_base import RounderConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.model.architecture import Architecture
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_PRECISION = "bits of an activation while calibration text ran"


class QuantizeGptq(RounderConfig):
    """GPTQ with static groups: lowest layer error that integer codes reach without training."""

    source: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"

    method: Literal["quantize.gptq"] = "quantize.gptq"
    grid: CompensatedSearch = option(
        "obs",
        "How the scale of a group is chosen, before compensation: `minmax` covers every weight, "
        "`mse` shrinks the range to the smallest rounding error, `imatrix` weights that error by "
        "the mean square of each input, `obs` by what is left of it once the other inputs have "
        "made up for the error; `neuqi`, for asymmetric grids only, searches scale and zero-point "
        "jointly for the error of `obs`, and `clip` takes the error of what the group adds to the "
        "output, correlations of inputs included.",
        effect="After compensation itself the cheapest gain in accuracy. Compensation takes off "
        "most of what an error in a strong input costs, so that `obs` weighs inputs more evenly "
        "than `imatrix` and is nearer on other text than that of the calibration as well. `clip` "
        "is for rounding to nearest: under compensation it was behind both; `neuqi` was level.",
        source="Optimal Brain Surgeon, Hassibi & Stork 1993, eq. 5; NeUQI, arXiv:2505.17595; AWQ, "
        "arXiv:2306.00978; LOG.md, the grid of GPTQ and grids",
    )
    act_order: bool = option(
        True,
        "Round the input columns in order of falling activation energy, with the groups fixed "
        "beforehand (static groups).",
        effect="Better at every width and free at inference: the layout on disk is unchanged.",
        source="GPTQ `--act-order --static-groups`",
    )
    damping: float = option(
        0.1,
        "Share of the mean of the Hessian's diagonal that is added to the diagonal.",
        effect="Larger is safer with little calibration text and compensates less. With the "
        "customary 0.01, calibrated on prose alone, code came out worse than rounded to nearest; "
        "0.1 was better there and on prose. When the factorisation fails, damping is raised in "
        "steps up to 1 before `on_failure` applies.",
        source="GPTQ `percdamp`; LOG.md, unseen domains",
        gt=0,
        le=1,
    )
    shrinkage: float = option(
        0.0,
        "Share by which correlations between inputs are scaled down in the Hessian: 0 trusts the "
        "calibration text, 1 keeps its variances only, which rounds to nearest.",
        effect="A second guard beside `damping` against text that the calibration lacks. 0.3 with "
        "damping 0.01 helped less than damping 0.1 alone.",
        source="Ledoit & Wolf 2004, with the diagonal as the target",
        ge=0,
        le=1,
    )
    propagate: float = option(
        0.5,
        "Share β by which a matrix aims to undo what rounding the blocks before it did to its "
        "inputs: 0 aims at the original weights W, 1 at the weights W* that bring the rounded "
        "model's outputs closest to the original's.",
        effect="Lowers the distance to the original model, 1 fitting the calibration text "
        "closest and 0.5 other text best. Above 0 the parent runs beside the rounded model: about "
        "twice the forward passes, the memory for blocks and activations and the space to resume, "
        "and a second moment matrix per input. Routed experts keep their own weights as their "
        "aim, because the two models may route a token differently.",
        source="Qronos, arXiv:2505.11695; QEP, arXiv:2504.09629; LOG.md, unseen domains",
        ge=0,
        le=1,
    )
    gptaq: float = option(
        0.0,
        "Share α by which columns that are still open answer, while the others are rounded, what "
        "rounding the blocks before did to their inputs: GPTAQ's way to the aim of `propagate`, "
        "instead of it. 0 leaves it off.",
        effect="Gained about half of what `propagate` gains on the built-in model, for the same "
        "forward passes and longer solving; there for comparison. The authors take 0.25. Sweeps go "
        "on towards the aim of `propagate` with the same share.",
        source="GPTAQ, arXiv:2504.02692; LOG.md, GPTAQ",
        ge=0,
        le=1,
    )
    sweeps: int = option(
        2,
        "Passes of coordinate descent after GPTQ: each code is moved to its best value given all "
        "others, as long as the layer error falls.",
        effect="2 lower the layer error on unseen text by 4 % at 4 bits and 8 % at 2 bits, for two "
        "to three times the solving time, which is small beside the forward passes; 0 is GPTQ "
        "as published.",
        source="cyclic coordinate descent, as in QuantEase, arXiv:2309.01885",
        ge=0,
        le=100,
    )
    block_size: int = option(
        32,
        "Columns solved one by one between two matrix products.",
        effect="Speed and memory only; the codes do not depend on it beyond float rounding.",
        source="GPTQ, section 3.3, step 2",
        ge=1,
    )
    sequential: Literal["block", "sublayer"] = option(
        "sublayer",
        "Which inputs a matrix is calibrated on: `block`, those of the decoder block with all "
        "earlier blocks rounded; `sublayer`, in addition with the earlier matrices of the same "
        "block rounded, so that o_proj sees the rounded q, k and v.",
        effect="`sublayer` lets forwards stand still in front of each matrix, one forward in all; "
        "where memory does not hold them, they run anew for each. `block` needs two. On its own "
        "`sublayer` gains little. `propagate` is exact only with it: with `block`, matrices "
        "later in a block make up once more for what earlier ones made up for, so that more than "
        "about 0.5 harms.",
        source="GPTQ `--true-sequential`",
    )
    precision: Literal["auto", "float32"] = option(
        "auto",
        "Precision in which calibration text runs through the blocks: `auto`, the model's own "
        "where the processor has units for it (bf16 with AMX or AVX512-BF16, bf16 and fp16 on a "
        "GPU), else fp32.",
        effect="With AMX a third of the time and half the memory for activations. Hessians are "
        "summed and matrices solved in fp32 or fp64 either way; the report says which it was.",
        source="LOG.md, calibration in the model's own precision",
    )
    robust: bool = option(
        False,
        "Let the worst domain decide: `damping` and `propagate` are chosen around their values by "
        "the worst domain's KL on held-out text, and the domains of the calibration text are "
        "weighed anew before every block, those on which the model has drifted furthest counting "
        "more (χ²-ball rule).",
        effect="Lowers the distance of the worst domain by a few percent and raises the mean by "
        "about as much; no help for domains that the calibration text lacks. Takes half as long "
        "again on a deep model, several times as long on a shallow one.",
        source="DRPruning, arXiv:2411.14055; Namkoong & Duchi 2016; LOG.md, robust calibration",
    )
    radius: float = option(
        0.1,
        "How far `robust` may move the weights of domains from their shares in the text, as a χ² "
        "divergence; 0 keeps them and chooses `damping` and `propagate` only.",
        effect="At 0.1 a domain that is a fifth of the text may come to count as two fifths.",
        source="DRPruning, arXiv:2411.14055",
        ge=0,
    )
    on_failure: Literal["rtn", "stop"] = option(
        "rtn",
        "What happens to a matrix whose Hessian cannot be factorised even with full damping: "
        "`rtn` rounds it to nearest, `stop` ends the run.",
        effect="Either way the report says so; nothing falls back silently.",
    )

    @model_validator(mode="after")
    def _one_way_to_propagate(self) -> Self:
        """With `gptaq`, the default of `propagate` gives way; what is written stays."""
        if self.gptaq and "propagate" not in self.model_fields_set:
            vars(self)["propagate"] = 0.0
        return self

    @property
    def tried(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Dampings and shares β that `robust` tries, the recipe's own first."""
        dampings = (self.damping, self.damping / 3, min(3 * self.damping, 1.0))
        shares = (self.propagate, max(self.propagate - 0.25, 0.0), min(self.propagate + 0.25, 1.0))
        return tuple(dict.fromkeys(dampings)), tuple(dict.fromkeys(shares))

    def unread(self) -> Mapping[str, str]:
        """`radius` is for `robust`."""
        return super().unread() if self.robust else {**super().unread(), "radius": "robust: true"}

    def tried_blocks(self, layers: int) -> int:
        """Blocks that `robust` rounds once for every pair it tries."""
        return min(layers, max(2, layers // 10))

    def operations(self, after: Architecture, tokens: int, plain: float) -> float:
        """With `robust`, the first blocks once more for every pair of options that is tried."""
        del tokens
        pairs = self._pairs if self.robust else 0
        return plain * (1 + pairs * self.tried_blocks(after.layers) / after.layers)

    def remarks(self, before: Architecture) -> tuple[str, ...]:
        """What every rounder says, and what `robust` costs."""
        said = super().remarks(before)
        if not self.robust:
            return said
        blocks, layers = self.tried_blocks(before.layers), before.layers
        sublayers = self.sequential == "sublayer"
        held = (moments_held(before, i, streams=2, sublayers=sublayers) for i in range(layers))
        return (
            *said,
            f"robust tries {self._pairs} pairs of damping and propagate on {blocks} of {layers} "
            "blocks, keeps two moments of every domain of the text apart, up to "
            f"{4 * max(held) / 1e6:.1f} MB a domain, and runs held-out text behind the rest",
        )

    @property
    def _pairs(self) -> int:
        dampings, shares = self.tried
        return len(dampings) + len(shares) - 1

    def plan(self, architecture: Architecture, problems: ReportProblem) -> Architecture:
        """Bits per matrix after the stage; the grid's search must suit them."""
        check_grid(self.grid, self.schemes(architecture), problems)
        if self.gptaq and self.propagate:
            problems(
                "gptaq",
                "gptaq and propagate both make up for what rounding did to the inputs; together "
                "they would make up for it twice",
                "write `propagate: 0`, or leave `gptaq` out",
            )
        if self.gptaq and self.robust:
            message = "robust chooses `propagate` on held-out text, which gptaq replaces"
            problems("gptaq", message, "leave `gptaq` out, or write `robust: false`")
        return super().plan(architecture, problems)

    def calibration_need(self) -> Need | None:
        """Compensation needs the second moments of the inputs, always."""
        return Need("method", "quantize.gptq measures its Hessians on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Round every target on inputs that passed through the blocks rounded before it."""
        from compressor.model.precision import calibration_dtype
        from compressor.stages.robust import robust_gptq
        from compressor.stages.rounding import round_model
        from compressor.stages.solving import compensated

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        dtype = calibration_dtype(self.precision, checkpoint, context.device)
        context = replace(context, dtype=dtype)
        if self.robust:
            result = robust_gptq(self, checkpoint, calibration, context)
        else:
            result = round_model(
                self,
                compensated(self),
                checkpoint,
                calibration.batches,
                context,
                sublayers=self.sequential == "sublayer",
                reference=self.propagate > 0 or self.gptaq > 0,
            )
        return replace(result, notes={**result.notes, _PRECISION: 8.0 * context.dtype.itemsize})
