"""What each stage and each deliverable costs: bits, bytes, memory and time.

Formulas of one architecture are in `compressor.cost`; here they meet the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from pydantic import BaseModel, ConfigDict

from compressor import machine
from compressor.calibration import development_tokens, load_mix
from compressor.cost import (
    block_memory,
    checkpoint_bytes,
    embedding_bytes,
    linear_bits,
    parked_bytes,
    role_bytes,
    rounding_flops,
)
from compressor.formats import gguf_types
from compressor.formats.capabilities import ENVIRONMENTS
from compressor.formats.sizes import Role
from compressor.formats.support import loading
from compressor.model.architecture import Architecture
from compressor.order import cautions
from compressor.recipe import Recipe
from compressor.sections import ExportConfig
from compressor.stages.base import StageConfig
from compressor.stages.packing import targets_of

# Forward passes of a block. `block`: one that captures all inputs and one onward. `sublayer`: one
# that stands still in front of each matrix until it has been rounded. The parent, which nobody
# changes, needs one.
_PASSES = {"block": 2.0, "sublayer": 1.0}

_PARENT_PASSES = 1.0


class Priced(BaseModel):
    """A frozen row of the plan."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class StagePlan(Priced):
    """One stage as it will run.

    Attributes:
        index: place in the recipe, from 0.
        method: `family.name`.
        parameters: of the model it leaves, ties counted once.
        matrices: how many matrices it changes.
        bits_nominal: mean code width over the weights of linear layers in blocks.
        bits_linear: the same with scales and zero-points.
        bits_checkpoint: 8 · packed bytes / parameters of the base, the headline.
        packed_bytes: of all tensors in a packed export.
        by_role: the same by what they hold.
        disk_bytes: what the stage itself writes: a dense checkpoint and the codes.
        peak_bytes: memory, estimated.
        flops: floating-point operations, estimated.
        seconds: estimated.
        remarks: what a user should know about the stage on this model.
    """

    index: int
    method: str
    parameters: int
    matrices: int
    bits_nominal: float
    bits_linear: float
    bits_checkpoint: float
    packed_bytes: int
    by_role: dict[Role, int]
    disk_bytes: int
    peak_bytes: int
    flops: float
    seconds: float
    remarks: tuple[str, ...] = ()


class ExportPlan(Priced):
    """One deliverable: bytes of its tensors."""

    format: str
    tensor_bytes: int
    ratio: float  # base bytes / these bytes
    remarks: tuple[str, ...] = ()


def stage_plan(
    recipe: Recipe, index: int, chain: Sequence[Architecture], tokens: int, rate: float
) -> StagePlan:
    """What one stage costs.

    Args:
        recipe: whose stage it is.
        index: of the stage.
        chain: the architecture before the first stage and after each.
        tokens: of the calibration text.
        rate: operations per second.
    """
    stage, base, before, after = recipe.stages[index], chain[0], chain[index], chain[index + 1]
    reads_text = stage.calibration_need() is not None
    changed = stage.changed(before, after)
    reference = runs_parent(stage)
    sequential = getattr(stage, "sequential", "block")
    passes = _PASSES[sequential] + (_PARENT_PASSES if reference else 0.0)
    tokens = tokens if reads_text else 0
    plain = rounding_flops(changed, after, tokens, passes, reference=reference)
    flops = stage.flops(before) or stage.operations(after, tokens, plain)
    held_out, domains = 0, 1
    if getattr(stage, "robust", False):
        held_out, domains = development_tokens(), _domains(recipe)
    nominal, linear = linear_bits(after)
    earlier = [one.method for one in recipe.stages[:index]]
    packed = checkpoint_bytes(after)
    return StagePlan(
        index=index,
        method=stage.method,
        parameters=after.parameters,
        matrices=len(changed),
        bits_nominal=nominal,
        bits_linear=linear,
        bits_checkpoint=8 * packed / base.parameters,
        packed_bytes=packed,
        by_role=role_bytes(after),
        disk_bytes=after.bytes + sum(matrix.parameters for matrix in changed),
        peak_bytes=stage.memory(before)
        or block_memory(
            after,
            tokens + held_out,
            reference=reference,
            domains=domains,
            standing=sequential == "sublayer",
            activation_bytes=_activation_bytes(stage, before),
        )
        + stage.working_memory(after, tokens),
        flops=flops,
        seconds=flops / rate,
        remarks=(
            *stage.remarks(before),
            *stage.misjudged(recipe.stages[index + 1 :]).values(),
            *cautions(earlier, stage),
        ),
    )


def _activation_bytes(stage: StageConfig, before: Architecture) -> int:
    """Size of a number while calibration text runs, on the CPU."""
    own = getattr(stage, "precision", "float32") == "auto" and before.dtype == "bfloat16"
    return 2 if own and machine.multiplies_bf16() else 4


def runs_parent(stage: StageConfig) -> bool:
    """Whether the stage runs its parent beside the model it changes."""
    asks = ("propagate", "align", "robust", "runs_parent")
    return any(getattr(stage, name, False) for name in asks)


def _domains(recipe: Recipe) -> int:
    """Domains of the calibration text; text of the user's own is one."""
    config = recipe.calibration
    return 1 if config is None or config.source is not None else len(load_mix(config.mix).domains)


def hidden_states(stage: StageConfig, base: Architecture, tokens: int) -> int:
    """Vectors that a stage which walks back keeps on disk beyond those of one block."""
    counted = getattr(stage, "hidden_states", None)
    return int(counted(base, tokens)) if counted else 0


def export_plan(export: ExportConfig, base: Architecture, final: Architecture) -> ExportPlan:
    """Bytes of one deliverable of what the last stage leaves."""
    if export.type is not None:
        return _typed_plan(export.type, export.name, base, final)
    size, remarks = checkpoint_bytes(final, export.container), []
    if export.format == "dense":
        size = final.bytes
    elif export.format in ENVIRONMENTS:  # graphs hold fp32
        size = 4 * final.parameters
    elif export.format == "gguf":
        size -= embedding_bytes(final) - embedding_bytes(final, export.blocks)
        remarks = _embedding_remarks(export, final, size)
    return ExportPlan(
        format=export.name,
        tensor_bytes=size,
        ratio=base.bytes / size,
        remarks=(*remarks, *_refusals(export, final)),
    )


def _refusals(export: ExportConfig, final: Architecture) -> Iterator[str]:
    """Programs that read the format, and would not load this deliverable."""
    found = loading(targets_of(final), export.container, final.cache)
    for titles, why in found.refusals.items():
        yield f"{titles} would not load it: {why}"


def _embedding_remarks(export: ExportConfig, final: Architecture, size: int) -> list[str]:
    """What a GGUF file of `size` bytes holds of an embedding and a head without codes."""
    dense, rounded = (
        embedding_bytes(final, kind) / 1e6 for kind in (None, export.blocks or "Q8_0")
    )
    if export.blocks is not None:
        return [
            f"the embedding becomes {export.blocks}, {rounded:.1f} MB in place of {dense:.1f}: a "
            "rounding of its own, whose KL is measured as a row of its own"
        ]
    if dense * 1e6 < size / 4 or not any(matrix.scheme for matrix in final.matrices):
        return []
    return [
        f"{dense:.1f} MB of it are the embedding in {final.dtype}; `embedding: Q8_0` would make "
        f"that {rounded:.1f}, and measure what it costs"
    ]


def _typed_plan(
    kind: gguf_types.QuantType, name: str, base: Architecture, final: Architecture
) -> ExportPlan:
    """Bytes by the mean bits of a mixture, since its quantizer chooses for each matrix."""
    matrices = [(matrix.shape, matrix.block is None) for matrix in final.matrices]
    size = gguf_types.estimated_bytes(kind, matrices)
    size += 4 * sum(math.prod(shape) for _, shape in final.others)
    remarks = [f"rounded to {kind} by llama.cpp's own quantizer, measured after; size estimated"]
    wider = gguf_types.undivided(kind, [shape for shape, _ in matrices])
    if wider:
        remarks.append(
            f"{wider} of {len(matrices)} matrices have widths that {gguf_types.SUPER_BLOCK} does "
            f"not divide; in the decoder they become {gguf_types.instead(kind)}"
        )
    return ExportPlan(
        format=name, tensor_bytes=size, ratio=base.bytes / size, remarks=tuple(remarks)
    )


def disk_bytes(
    stages: Sequence[StagePlan],
    exports: Sequence[ExportPlan],
    base: Architecture,
    spilled: int,
    evaluation: int,
) -> int:
    """Checkpoints of all stages, deliverables, hidden states of tokens for stages and the KL."""
    written = sum(stage.disk_bytes for stage in stages)
    written += sum(export.tensor_bytes for export in exports)
    return written + (spilled + evaluation) * base.hidden * 4


def calibration_tokens(recipe: Recipe) -> int:
    """Tokens that every calibrated stage reads."""
    if recipe.calibration is None:
        return 0
    samples: int = recipe.calibration.samples
    return samples * recipe.calibration.length


def parked(stage: StageConfig, base: Architecture, tokens: int) -> int:
    """Bytes of forwards that stand still, while the stage runs."""
    if getattr(stage, "sequential", "") != "sublayer":
        return 0
    return parked_bytes(
        base,
        tokens,
        reference=runs_parent(stage),
        activation_bytes=_activation_bytes(stage, base),
    )
