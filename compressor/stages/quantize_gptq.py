"""`quantize.gptq`: round one input column at a time and compensate in the columns that follow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from compressor.stages.base import Need, option
from compressor.stages.quantize_base import RounderConfig

if TYPE_CHECKING:
    from compressor.calibration import CalibrationSet
    from compressor.stages.context import StageContext
    from compressor.types import StageResult

_PRECISION = "bits of an activation while calibration text ran"


class QuantizeGptq(RounderConfig):
    """GPTQ with static groups: lowest layer error that integer codes reach without training."""

    source: ClassVar[str] = "Frantar et al. 2022, GPTQ, arXiv:2210.17323"

    method: Literal["quantize.gptq"] = "quantize.gptq"
    grid: Literal["minmax", "mse", "imatrix"] = option(
        "mse",
        "How the scale of a group is chosen, before compensation: `minmax` covers every weight, "
        "`mse` shrinks the range to the smallest rounding error, `imatrix` weights that error by "
        "the mean square of each input.",
        effect="After compensation itself the cheapest gain in accuracy. `imatrix` trusts the "
        "calibration text once more: calibrated on one kind of text it lost on all others.",
        source="clip search of GPTQ and AutoRound",
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
        effect="`sublayer` runs parts of a block again for every input: a quarter more passes. "
        "On its own it gains little. `propagate` is exact only with it: with `block`, matrices "
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
    on_failure: Literal["rtn", "stop"] = option(
        "rtn",
        "What happens to a matrix whose Hessian cannot be factorised even with full damping: "
        "`rtn` rounds it to nearest, `stop` ends the run.",
        effect="Either way the report says so; nothing falls back silently.",
    )

    def calibration_need(self) -> Need | None:
        """Compensation needs the second moments of the inputs, always."""
        return Need("method", "quantize.gptq measures its Hessians on calibration text")

    def run(
        self, checkpoint: Path, calibration: CalibrationSet | None, context: StageContext
    ) -> StageResult:
        """Round every target on inputs that passed through the blocks rounded before it."""
        import torch

        from compressor.model.precision import working_dtype
        from compressor.stages.rounding import round_model
        from compressor.stages.solving import compensated

        assert calibration is not None  # calibration_need() says so; the recipe was checked
        own = self.precision == "auto"
        dtype = working_dtype(checkpoint, context.device) if own else torch.float32
        context = replace(context, dtype=dtype)
        result = round_model(
            self,
            compensated(self),
            checkpoint,
            calibration.batches,
            context,
            sublayers=self.sequential == "sublayer",
            reference=self.propagate > 0,
        )
        return replace(result, notes={**result.notes, _PRECISION: 8.0 * context.dtype.itemsize})
