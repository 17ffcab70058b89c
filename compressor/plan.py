"""What a recipe will do to a model, worked out from `config.json` alone, before any work.

Every stage maps the architecture to the next one, so that whatever can be refused without
weights is refused here, at the line of the recipe that causes it. What is accepted is priced:
parameters, bits, bytes on disk, memory, time. Bytes are exact by formula; memory, operations and
time are estimates, with their formulas in the docstrings below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import get_args

from pydantic import BaseModel, ConfigDict

from compressor import machine
from compressor.calibration import development_tokens, load_mix, require_origin
from compressor.cost import (
    block_memory,
    checkpoint_bytes,
    dense_outer,
    embedding_bytes,
    evaluation_memory,
    evaluation_tokens,
    flops_per_second,
    linear_bits,
    parked_bytes,
    role_bytes,
    rounding_flops,
)
from compressor.efforts import DEFAULT, EffortName
from compressor.errors import ModelError, PlanError, ResourceError, UsageError
from compressor.evaluation.suites import load_suite
from compressor.formats import gguf_types, llama_quantize
from compressor.formats.capabilities import ENVIRONMENTS, PACKAGES
from compressor.formats.exchange import GGUF_BLOCK, container_problems
from compressor.formats.sizes import Role
from compressor.formats.support import Target, cache_problems, engine_problems
from compressor.model.architecture import Architecture
from compressor.order import cautions, order_problems
from compressor.programs import PROGRAMS
from compressor.recipe import ExportConfig, ExportFormat, Recipe
from compressor.source import Location
from compressor.stages.base import ReportProblem, StageConfig
from compressor.stages.packing import target_of
from compressor.types import Problem

# Formats for quantized weights only.
_PACKED = ("compressed-tensors", "gptq", "awq", "bitsandbytes")
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


class Plan(Priced):
    """Everything that is known before a weight is read.

    Attributes:
        model: as typed.
        family: such as "Llama".
        parameters: of the base, ties counted once.
        base_bytes: of the base's tensors.
        stages, exports: in the order of the recipe.
        calibration_tokens: that every calibrated stage reads.
        evaluation_tokens: that every variant is scored on, estimated.
        context_length: longest window the model accepts, tokens.
        disk_bytes: most that the run's directory will hold, estimated from above.
        peak_bytes: most memory of any step, estimated.
        whole_bytes: of the largest checkpoint on the way, as stored.
        seconds: of the whole run, estimated.
        effort: at which the recipe was read.
        efforts: seconds at every effort of the recipe, None where it cannot work on this model;
            empty when it has one effort only.
        rate: operations per second behind `seconds`, and where that number is from.
    """

    model: str
    family: str
    parameters: int
    base_bytes: int
    stages: tuple[StagePlan, ...]
    exports: tuple[ExportPlan, ...]
    calibration_tokens: int
    evaluation_tokens: int
    context_length: int
    disk_bytes: int
    peak_bytes: int
    whole_bytes: int
    seconds: float
    rate: tuple[float, str]
    effort: EffortName = DEFAULT
    efforts: dict[EffortName, float | None] = {}

    def beside(self, recipes: Mapping[EffortName, Recipe], config: Mapping[str, object]) -> Plan:
        """The same with the time that each effort of the recipe takes, where it has several.

        Args:
            recipes: by effort, this plan's too.
            config: content of the model's `config.json`.
        """
        if len(recipes) < 2:
            return self
        times = {name: _seconds(recipe, config, self.model) for name, recipe in recipes.items()}
        return self.model_copy(update={"efforts": times | {self.effort: self.seconds}})


def _seconds(recipe: Recipe, config: Mapping[str, object], model: str) -> float | None:
    """Estimated; None where the plan refuses the recipe."""
    try:
        return make_plan(recipe, config, model).seconds
    except PlanError:
        return None


def make_plan(
    recipe: Recipe,
    config: Mapping[str, object],
    model: str,
    *,
    settled: Mapping[int, Mapping[str, object]] = MappingProxyType({}),
) -> Plan:
    """Check a recipe against a model and price it.

    Args:
        recipe: as loaded; its problems point into its file.
        config: content of the model's `config.json`.
        model: the model as typed, for the plan's heading.
        settled: by index of a stage that has run, the `config.json` it left; for stages of which
            the plan could only guess it.

    Raises:
        PlanError: the chain cannot work on this model; carries every reason found.
        ModelError: the model's family is unknown, or it is compressed already.
    """
    base = Architecture.from_config(config)
    if base.quantized:
        raise ModelError(
            f"{model} is quantized already; rounding it again would add up the errors",
            "start from the original weights",
        )
    problems = _order(recipe)
    chain = _chain(recipe, base, problems, settled)
    problems += _unspent(recipe, chain[-1])
    if not problems:  # else the exports would repeat what is wrong with the stages
        problems += _exports(recipe, chain[-1])
    problems += _texts(recipe)
    if problems:
        raise PlanError(problems)
    return _price(recipe, chain, model)


# ---------------------------------------------------------------------- what cannot work


def _order(recipe: Recipe) -> list[Problem]:
    methods = [stage.method for stage in recipe.stages]
    return [
        recipe.problem(("stages", found.index, "method"), found.message, found.hint)
        for found in order_problems(methods)
    ]


def _chain(
    recipe: Recipe,
    base: Architecture,
    problems: list[Problem],
    settled: Mapping[int, Mapping[str, object]],
) -> list[Architecture]:
    """The architecture before the first stage and after each; adds to `problems`."""
    chain = [base]
    for index, stage in enumerate(recipe.stages):
        report = _reporter(recipe, index, problems)
        planned = stage.plan(chain[-1], report)
        stage.check_text(recipe.calibration, report)
        chain.append(Architecture.from_config(settled[index]) if index in settled else planned)
    return chain


def _unspent(recipe: Recipe, final: Architecture) -> list[Problem]:
    """A stage that chooses grids with no stage after it that uses them."""
    if not any(matrix.allotted for matrix in final.matrices) or any(
        matrix.scheme for matrix in final.matrices
    ):
        return []
    return [
        recipe.problem(
            ("stages", index, "method"),
            f"{stage.method} chooses grids, and no stage after it rounds to them",
            "add quantize.gptq or quantize.rtn behind it",
        )
        for index, stage in enumerate(recipe.stages)
        if hasattr(stage, "choices")
    ]


def _possible(recipe: Recipe, final: Architecture) -> Iterator[Architecture]:
    """What the run may come to: the plan's example, and every grid that a stage may choose."""
    yield final
    for stage in recipe.stages:
        yield from stage.alternatives(final)


def _reporter(recipe: Recipe, index: int, problems: list[Problem]) -> ReportProblem:
    """Turn a stage's (option, message, hint) into a problem at the option's place."""

    def report(option: str, message: str, hint: str) -> None:
        steps: Location = tuple(int(s) if s.isdigit() else s for s in option.split("."))
        method = recipe.stages[index].method
        problems.append(
            recipe.problem(("stages", index, *steps), f"{method}.{steps[0]}: {message}", hint)
        )

    return report


def _exports(recipe: Recipe, final: Architecture) -> list[Problem]:
    """Deliverables that a format cannot hold or an engine would not load."""
    found = []
    for index, export in enumerate(recipe.export):
        if export.format not in _serving(final):
            found.append(_forgotten_inputs(recipe, index, final))
            continue
        targets = _targets(final)
        found += _cache_problems(recipe, index, final)
        possible = [_targets(one) for one in _possible(recipe, final)]
        bare = all(target.scheme is None for target in targets) and final.cache is None
        if export.format in _PACKED and bare:
            message = f"nothing is quantized, so there is nothing to pack as {export.format}"
            hint = "add a quantize stage, or export `dense`"
            found.append(recipe.problem(("export", index, "format"), message, hint))
        sentences = [
            sentence
            for one in possible
            for sentence in container_problems(one, export.container, final.model_type)
        ]
        for message in _summary(list(dict.fromkeys(sentences))):
            hint = _HINTS.get(export.container, "change the stage, or export `dense`")
            found.append(recipe.problem(("export", index, "format"), message, hint))
        found += _second_quantizer(recipe, index)
        found += _embedding_problems(recipe, index, final)
        package = PACKAGES.get(export.format)
        if package and find_spec(package) is None:
            message = f"{export.format} export needs the package {package}, which is not installed"
            hint = f"pip install {package}"
            found.append(recipe.problem(("export", index, "format"), message, hint))
        found += _missing_environment(recipe, index)
        for engine in export.engines:
            sentences = [
                sentence
                for one in possible
                for sentence in engine_problems(engine, one, export.container)
            ]
            for message in _summary(list(dict.fromkeys(sentences))):
                hint = f"change the stage, or take {engine} out of `engines`"
                found.append(recipe.problem(("export", index, "engines"), message, hint))
    return found


_HINTS: Mapping[str, str] = {
    "llama-quantize": "leave `type` out and the codes go into the file as they are, or leave the "
    "rounding to the quantizer",
}


def _second_quantizer(recipe: Recipe, index: int) -> list[Problem]:
    """An export that llama.cpp's quantizer writes, where there is none."""
    if recipe.export[index].type is None or llama_quantize.find_program() is not None:
        return []
    message, hint = llama_quantize.missing(), llama_quantize.HINT
    return [recipe.problem(("export", index, "type"), message, hint)]


def _embedding_problems(recipe: Recipe, index: int, final: Architecture) -> list[Problem]:
    """An embedding that the export is to round, and cannot."""
    kind, dense = recipe.export[index].blocks, dense_outer(final)
    if kind is None:
        return []
    message = ""
    if not dense:
        message = "the chain has rounded the embedding, so that nothing is left to round"
    elif wide := [matrix for matrix in dense if matrix.shape[1] % GGUF_BLOCK]:
        message = (
            f"{wide[0].name} has {wide[0].shape[1]} inputs; blocks of {kind} have {GGUF_BLOCK}"
        )
    hint = "leave `embedding` out"
    return [recipe.problem(("export", index, "embedding"), message, hint)] if message else []


def _missing_environment(recipe: Recipe, index: int) -> list[Problem]:
    """A program that has to write the format, and is not there."""
    form = recipe.export[index].format
    if form not in ENVIRONMENTS:
        return []
    try:
        PROGRAMS[ENVIRONMENTS[form]].find()
    except ResourceError as error:
        message = f"{form} export needs another program: {error.message}"
        return [recipe.problem(("export", index, "format"), message, error.hint)]
    return []


def _cache_problems(recipe: Recipe, index: int, final: Architecture) -> list[Problem]:
    """A rounded cache that a format or an engine does not take."""
    if final.cache is None:
        return []
    export = recipe.export[index]
    found = dict.fromkeys(
        message
        for one in _possible(recipe, final)
        for message in cache_problems(_targets(one), export.container, final.cache, export.engines)
    )
    return [
        recipe.problem(
            ("export", index, "format"), message, "leave quantize.kv out, or change this"
        )
        for message in found
    ]


def _serving(final: Architecture) -> Sequence[str]:
    """The formats that can say how the model's inputs are rounded."""
    numbers = {scheme.number for scheme in final.activations.values()}
    if not numbers:
        return get_args(ExportFormat)
    return ("bitsandbytes",) if numbers == {"absmax"} else ("compressed-tensors",)


def _forgotten_inputs(recipe: Recipe, index: int, final: Architecture) -> Problem:
    """A format that holds weights only would be served otherwise than it was measured."""
    name, scheme = next(iter(final.activations.items()))
    message = (
        f"{recipe.export[index].format} cannot say that inputs are rounded ({name}, to "
        f"{scheme.name}), so that it would not give what is measured"
    )
    (right,) = _serving(final)
    hint = f"export {right}, or do not round inputs"
    return recipe.problem(("export", index, "format"), message, hint)


def _summary(sentences: Sequence[str], most: int = 1) -> list[str]:
    """The first few of many sentences of one kind; a model has hundreds of matrices."""
    kept = list(sentences[:most])
    if len(sentences) > most:
        kept[-1] += f" (and {len(sentences) - most} more problems like these)"
    return kept


def _targets(architecture: Architecture) -> list[Target]:
    return [
        target_of(matrix, architecture)
        for matrix in architecture.matrices
        if matrix.role != "position"
    ]


def _texts(recipe: Recipe) -> list[Problem]:
    """Text that the recipe names and that does not exist."""
    found: list[Problem] = []
    calibration = recipe.calibration
    if calibration is not None:
        origin = "mix" if calibration.source is None else "source"
        with _reported(recipe, ("calibration", origin), found):
            require_origin(calibration)
    if not recipe.evaluate.text:
        with _reported(recipe, ("evaluate", "suite"), found):
            load_suite(recipe.evaluate.suite)
    for domain, path in recipe.evaluate.text.items():
        if not Path(path).is_file():
            place = ("evaluate", "text", domain)
            found.append(recipe.problem(place, f"no file {path}", ""))
    return found


@contextmanager
def _reported(recipe: Recipe, place: Location, found: list[Problem]) -> Iterator[None]:
    """Within the block, a usage error is a problem at a place of the recipe."""
    try:
        yield
    except UsageError as error:
        found.append(recipe.problem(place, error.message, error.hint))


# ---------------------------------------------------------------------- what it costs


def _price(recipe: Recipe, chain: Sequence[Architecture], model: str) -> Plan:
    base, final = chain[0], chain[-1]
    rate = flops_per_second()
    calibration = _calibration_tokens(recipe)
    evaluation = evaluation_tokens(recipe.evaluate)
    stages = tuple(
        _stage_plan(recipe, index, chain, calibration, rate[0])
        for index in range(len(recipe.stages))
    )
    exports = tuple(_export_plan(export, base, final) for export in recipe.export)
    typed = any(export.type is not None for export in recipe.export)
    rows = sum(export.rounds for export in recipe.export)
    scored = 1 + recipe.evaluate.noise_floor + rows
    scored += len(stages) if recipe.evaluate.every_stage else min(1, len(stages))
    spilled = sum(_hidden_states(stage, base, calibration) for stage in recipe.stages)
    spilled += 2 * calibration * (1 + any(_runs_parent(stage) for stage in recipe.stages))
    scoring = scored * evaluation * 2 * base.parameters
    return Plan(
        model=model,
        family=base.family,
        parameters=base.parameters,
        base_bytes=base.bytes,
        stages=stages,
        exports=exports,
        calibration_tokens=calibration,
        evaluation_tokens=evaluation,
        context_length=base.max_positions,
        disk_bytes=_disk_bytes(stages, exports, base, spilled, evaluation)
        + max((_parked(stage, base, calibration) for stage in recipe.stages), default=0)
        + (final.bytes if typed else 0)
        + (4 * final.parameters if rows else 0),
        peak_bytes=max(
            [evaluation_memory(recipe.evaluate, base), *(stage.peak_bytes for stage in stages)]
        ),
        whole_bytes=max(architecture.bytes for architecture in chain),
        seconds=sum(stage.seconds for stage in stages)
        + (scoring + (2 * final.parameters * calibration if typed else 0)) / rate[0],
        rate=rate,
        effort=recipe.effort,
    )


def _stage_plan(
    recipe: Recipe, index: int, chain: Sequence[Architecture], tokens: int, rate: float
) -> StagePlan:
    stage, base, before, after = recipe.stages[index], chain[0], chain[index], chain[index + 1]
    reads_text = stage.calibration_need() is not None
    changed = stage.changed(before, after)
    reference = _runs_parent(stage)
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
        remarks=(*stage.remarks(before), *cautions(earlier, stage)),
    )


def _activation_bytes(stage: StageConfig, before: Architecture) -> int:
    """Size of a number while calibration text runs, on the CPU."""
    own = getattr(stage, "precision", "float32") == "auto" and before.dtype == "bfloat16"
    return 2 if own and machine.multiplies_bf16() else 4


def _runs_parent(stage: StageConfig) -> bool:
    """Whether the stage runs its parent beside the model it changes."""
    asks = ("propagate", "robust", "runs_parent")
    return any(getattr(stage, name, False) for name in asks)


def _domains(recipe: Recipe) -> int:
    """Domains of the calibration text; text of the user's own is one."""
    config = recipe.calibration
    return 1 if config is None or config.source is not None else len(load_mix(config.mix).domains)


def _hidden_states(stage: StageConfig, base: Architecture, tokens: int) -> int:
    """Vectors that a stage which walks back keeps on disk beyond those of one block."""
    counted = getattr(stage, "hidden_states", None)
    return int(counted(base, tokens)) if counted else 0


def _parked(stage: StageConfig, base: Architecture, tokens: int) -> int:
    """Bytes of forwards that stand still, while the stage runs."""
    if getattr(stage, "sequential", "") != "sublayer":
        return 0
    return parked_bytes(
        base,
        tokens,
        reference=_runs_parent(stage),
        activation_bytes=_activation_bytes(stage, base),
    )


def _export_plan(export: ExportConfig, base: Architecture, final: Architecture) -> ExportPlan:
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
        format=export.name, tensor_bytes=size, ratio=base.bytes / size, remarks=tuple(remarks)
    )


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


def _disk_bytes(
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


def _calibration_tokens(recipe: Recipe) -> int:
    if recipe.calibration is None:
        return 0
    samples: int = recipe.calibration.samples
    return samples * recipe.calibration.length
