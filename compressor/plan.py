"""What a recipe will do to a model, worked out from `config.json` alone, before any work.

Every stage maps the architecture to the next one, so that whatever can be refused without
weights is refused here, at the line of the recipe that causes it. What is accepted is priced:
parameters, bits, bytes on disk, memory, time. Bytes are exact by formula; memory, operations and
time are estimates, with their formulas in `compressor.pricing` and `compressor.cost`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pydantic import Field

from compressor.cost import evaluation_memory, evaluation_tokens, flops_per_second
from compressor.efforts import DEFAULT, EffortName
from compressor.errors import ModelError, PlanError
from compressor.export_checks import export_problems
from compressor.model.architecture import Architecture
from compressor.premises import order_problems, text_problems
from compressor.pricing import (
    ExportPlan,
    Priced,
    StagePlan,
    calibration_tokens,
    disk_bytes,
    export_plan,
    hidden_states,
    parked,
    runs_parent,
    stage_plan,
)
from compressor.recipe import Recipe
from compressor.source import Location
from compressor.stages.base import ReportProblem
from compressor.types import Problem


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
    efforts: dict[EffortName, float | None] = Field(default_factory=dict)

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
    problems = recipe.problems()
    problems += order_problems([stage.method for stage in recipe.stages], recipe.problem)
    chain = _chain(recipe, base, problems, settled)
    problems += _unspent(recipe, chain[-1])
    # With stages that are not in order, exports would repeat what is wrong with them.
    problems += export_problems(recipe, chain[-1], settled=not problems)
    problems += _unsuited_text(recipe)
    problems += text_problems(recipe.calibration, recipe.evaluate, recipe.problem)
    problems += _too_long(recipe, base.max_positions)
    if problems:
        raise PlanError(problems)
    return _price(recipe, chain, model)


# ---------------------------------------------------------------------- what cannot work


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
        chain.append(Architecture.from_config(settled[index]) if index in settled else planned)
    return chain


def _unsuited_text(recipe: Recipe) -> list[Problem]:
    """Text on which a stage cannot work."""
    problems: list[Problem] = []
    for index, stage in enumerate(recipe.stages):
        stage.check_text(recipe.calibration, _reporter(recipe, index, problems))
    return problems


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
        if stage.chooses_grids
    ]


def _too_long(recipe: Recipe, context: int) -> list[Problem]:
    """Windows that the model's context does not hold; a suite's own shrink to it."""
    lengths = {"calibration": recipe.calibration, "evaluate": recipe.evaluate}
    return [
        recipe.problem(
            (key, "length"),
            f"{key}.length is {section.length}, but the model's context holds {context} tokens",
            f"length: {context}",
        )
        for key, section in lengths.items()
        if section is not None and section.length is not None and section.length > context
    ]


def _reporter(recipe: Recipe, index: int, problems: list[Problem]) -> ReportProblem:
    """Turn a stage's (option, message, hint) into a problem at the option's place."""

    def report(option: str, message: str, hint: str) -> None:
        steps: Location = tuple(int(s) if s.isdigit() else s for s in option.split("."))
        method = recipe.stages[index].method
        problems.append(
            recipe.problem(("stages", index, *steps), f"{method}.{steps[0]}: {message}", hint)
        )

    return report


# ---------------------------------------------------------------------- what it costs


def _price(recipe: Recipe, chain: Sequence[Architecture], model: str) -> Plan:
    base, final = chain[0], chain[-1]
    rate = flops_per_second()
    calibration = calibration_tokens(recipe)
    evaluation = evaluation_tokens(recipe.evaluate)
    stages = tuple(
        stage_plan(recipe, index, chain, calibration, rate[0])
        for index in range(len(recipe.stages))
    )
    exports = tuple(export_plan(export, base, final) for export in recipe.export)
    typed = any(export.type is not None for export in recipe.export)
    rows = sum(export.rounds for export in recipe.export)
    scored = 1 + recipe.evaluate.noise_floor + rows
    scored += len(stages) if recipe.evaluate.every_stage else min(1, len(stages))
    spilled = sum(hidden_states(stage, base, calibration) for stage in recipe.stages)
    spilled += 2 * calibration * (1 + any(runs_parent(stage) for stage in recipe.stages))
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
        disk_bytes=disk_bytes(stages, exports, base, spilled, evaluation)
        + max((parked(stage, base, calibration) for stage in recipe.stages), default=0)
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
