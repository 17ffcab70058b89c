"""A recipe: YAML -> frozen configuration, or every problem at once with its line and column.

    recipe = load_recipe("recipes/quickstart.yaml", ["stages.0.bits=3"])
    recipe = load_recipe("w4-gptq", effort="best")

Unknown keys are fatal at every level, types are not coerced, and a misspelt word is answered
with the nearest right one. `dump_lock` writes a recipe back with every default spelled out.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Union

from pydantic import (
    BaseModel,
    Field,
    PrivateAttr,
    SerializeAsAny,
    SkipValidation,
    ValidationError,
    WrapValidator,
    create_model,
    field_validator,
)
from ruamel.yaml import YAML

from compressor import resources
from compressor.calibration import CalibrationConfig
from compressor.diagnose import diagnose, nearest
from compressor.efforts import DEFAULT, KEY, EffortName, apart
from compressor.errors import RecipeError, UsageError
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.gates import Gates
from compressor.paths import resolve_paths, written_paths
from compressor.premises import order_problems, text_problems
from compressor.registry import registry
from compressor.section import Section
from compressor.sections import (
    Effort,
    Efforts,
    EngineName,
    ExportConfig,
    Lock,
    PublishConfig,
)
from compressor.source import Location, Source, apply_overrides, read_source, read_text
from compressor.stages.base import StageConfig
from compressor.types import Problem

UNDECISIVE = {"name", "description", "engines", "publish", "lock"}
"""Parts of a recipe that decide nothing about its result."""

_NAME = r"^([A-Za-z0-9][A-Za-z0-9._-]*)?$"


class Recipe(Section):
    """What to do with a model, in the order in which it happens."""

    name: str = Field(
        default="",
        description="Names the run; defaults to the file's name.",
        json_schema_extra={"pattern": _NAME},
    )
    description: str = Field(default="", description="One sentence for `compress ls recipes`.")
    seed: int = Field(default=0, ge=0, lt=2**63, description="Of everything random in the run.")
    calibration: CalibrationConfig | None = Field(
        default=None, description="Text that the stages look at. Needed by some methods."
    )
    stages: tuple[SerializeAsAny[StageConfig], ...] = Field(
        description="The methods, applied one after the other. May be empty where an export has a "
        "`type`, which rounds by itself."
    )
    evaluate: EvaluateConfig = Field(
        default=EvaluateConfig.model_validate({}), description="How every variant is measured."
    )
    gates: Gates = Field(
        default=Gates.model_validate({}), description="Limits the result must keep."
    )
    export: tuple[ExportConfig, ...] = Field(
        default=(ExportConfig(format="compressed-tensors"),), description="Deliverables."
    )
    engines: tuple[EngineName, ...] = Field(
        default=(),
        description="Programs that the result is for: the plan refuses the recipe where one of "
        "them would load none of the deliverables. See compress ls engines.",
    )
    publish: PublishConfig | None = Field(
        default=None,
        description="Publish the deliverables, unless a gate failed or is undecided; private if "
        "nothing else is said. As `compress publish`.",
    )
    lock: Lock | None = Field(default=None, description="Written by a run; pins what went into it.")

    _source: Source | None = PrivateAttr(None)
    _effort: EffortName = PrivateAttr(DEFAULT)

    @property
    def effort(self) -> EffortName:
        """The one that was chosen when the recipe was read, or when its lock was written."""
        return self.lock.effort if self.lock else self._effort

    @field_validator("name")
    @classmethod
    def _names_a_folder(cls, name: str) -> str:
        if not re.fullmatch(_NAME, name):
            raise ValueError(
                f"{name!r} is no name of a run: letters, digits, '.', '_' and '-', "
                "beginning with a letter or a digit"
            )
        return name

    @field_validator("stages")
    @classmethod
    def _settled(cls, stages: tuple[StageConfig, ...]) -> tuple[StageConfig, ...]:
        """Options that depend on later stages get their values, so that a lock file has them."""
        return tuple(stage.before(stages[index + 1 :]) for index, stage in enumerate(stages))

    @field_validator("export")
    @classmethod
    def _one_of_each(cls, exports: tuple[ExportConfig, ...]) -> tuple[ExportConfig, ...]:
        names = [export.name for export in exports]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"{min(twice)} is named twice; a format has one folder in the run")
        return exports

    def typed(self, location: Location) -> bool:
        """Whether a `--set` wrote just this value."""
        return self._source is not None and location in self._source.overrides

    def problem(self, location: Location, message: str, hint: str = "") -> Problem:
        """A problem at a place of the recipe, with file, line and column when it has a file."""
        if self._source is None:
            return Problem(f"{'.'.join(map(str, location))}: {message}", hint=hint)
        return self._source.problem(location, message, hint)

    def problems(self) -> list[Problem]:
        """What keys of the recipe take from each other, whatever the model."""
        return [*_idle(self), *_needs(self), *_unread(self), *_misplaced(self)]

    def text(self) -> str:
        """The recipe verbatim, or written out when it did not come from a file.

        The effort and values that `--set` replaced are named in comments; the lock file has them.
        """
        if self._source is None:
            return _dump_yaml(self.model_dump(mode="json", exclude_none=True))
        notes = [] if self._effort == DEFAULT else [f"# at --effort {self._effort}\n"]
        notes += [f"# replaced by {how}\n" for how in self._source.overrides.values()]
        return "".join(notes) + self._source.text

    def with_exports(self, added: Sequence[ExportConfig]) -> Recipe:
        """The same recipe with more deliverables; its problems no longer point into a file.

        Raises:
            UsageError: it has one of them already.
        """
        present = {export.name for export in self.export}
        for export in added:
            if export.name in present:
                raise UsageError(f"the run has a deliverable {export.name} already")
            present.add(export.name)
        changed: dict[str, Any] = {"export": (*self.export, *added)}
        if self.lock is not None:
            names = (*self.lock.added, *(export.name for export in added))
            changed["lock"] = self.lock.model_copy(update={"added": names})
        recipe = self.model_copy(update=changed)
        recipe._source = None
        return recipe

    def begun(self) -> Recipe:
        """The recipe without what `compress export` added to its run."""
        added = self.lock.added if self.lock else ()
        kept = tuple(export for export in self.export if export.name not in added)
        return self.model_copy(update={"export": kept})

    def fingerprint(self) -> str:
        """SHA-256 of everything that decides the result: not the name, say, or where it goes."""
        content = self.model_dump(mode="json", exclude=UNDECISIVE)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@cache
def recipe_model() -> type[Recipe]:
    """`Recipe` as a file has it: with `stages` told apart by `method`, and with `efforts`."""
    stages = _stages()
    unjudged = Annotated[stages | None, SkipValidation()]  # type: ignore[valid-type]
    effort = _with_stages(Effort, unjudged, default=None)
    efforts = create_model(
        "Efforts",
        __base__=Efforts,
        **{
            name: (effort | None, Field(default=None, description=field.description))
            for name, field in Efforts.model_fields.items()
        },  # type: ignore[call-overload]
    )
    described = Field(
        default=None,
        exclude=True,
        description="The same recipe at other efforts: what `compress RECIPE MODEL --effort light` "
        "or `best` changes. Keys are merged over those of the recipe; lists replace them.",
    )
    model = _with_stages(Recipe, stages)
    made: type[Recipe] = create_model("Recipe", __base__=model, efforts=(efforts | None, described))
    return made


@cache
def _python_model() -> type[Recipe]:
    """`Recipe` as Python has it: a stage may also be an object, of no registered method even."""

    def judged(value: Any, validate: Callable[[Any], StageConfig]) -> StageConfig:
        return value if isinstance(value, StageConfig) else validate(value)

    stages = _stages(WrapValidator(judged), SerializeAsAny())  # type: ignore[type-arg]
    made: type[Recipe] = _with_stages(Recipe, stages)
    return made


def _stages(*rules: Any) -> Any:
    """The type of `stages`: mappings that say by `method` what their keys are.

    Args:
        rules: more that pydantic should know of an entry.
    """
    classes = tuple(registry().get(method.name) for method in registry())
    written = Union[classes]  # type: ignore[valid-type]  # noqa: UP007
    stage = Annotated[(written, Field(discriminator="method"), *rules)]
    return tuple[stage, ...]


def _with_stages(model: type[BaseModel], annotation: Any, **rules: Any) -> Any:
    """The same section with `stages` of the registered methods."""
    field = Field(description=model.model_fields["stages"].description, **rules)
    return create_model(model.__name__, __base__=model, stages=(annotation, field))


def make_recipe(stages: Sequence[StageConfig | Mapping[str, Any]], **sections: Any) -> Recipe:
    """A recipe without a file.

    Args:
        stages: in order; as objects, or as mappings like those of a file.
        sections: the other keys of a recipe, likewise.

    Raises:
        RecipeError: a key or a value breaks a rule; carries every problem found.
    """
    data = {"stages": stages, **sections}
    try:
        return _python_model().model_validate(data)
    except ValidationError as error:
        places: dict[Location, str] = {(key,): key for key in data}
        places |= {("stages", index): f"stages.{index}" for index, _ in enumerate(stages)}
        source = Source("", "", data, {}, {}, places)
        raise RecipeError(diagnose(error, _python_model(), source)) from None


def load_recipe(
    path_or_name: str | Path,
    overrides: Sequence[str] = (),
    *,
    effort: EffortName = DEFAULT,
    allow_outside: bool = False,
) -> Recipe:
    """Read a recipe; every effort that it has is checked, whichever is chosen.

    Args:
        path_or_name: a file, or the name of a shipped recipe.
        overrides: `dotted.path=value`, as given to `--set`; they come after the effort.
        effort: the one to take; `default` is the recipe as it stands.
        allow_outside: let the recipe name files outside its own folder.

    Raises:
        RecipeError: anything is wrong with it; carries every problem found.
    """
    path = find_recipe(path_or_name)
    choices = _choices(path_or_name, path)
    if effort not in choices:
        message = f"{path.name} has no effort {effort!r}; it has: {', '.join(choices)}"
        raise RecipeError([Problem(message, hint="leave --effort out for the recipe as it stands")])
    found = {name: _checked(source, path, allow_outside) for name, source in choices.items()}
    common = set(found[DEFAULT][1])
    mistyped: list[Problem] = []
    if overrides:
        chosen = _choices(path_or_name, path)[effort]
        mistyped = _override(chosen, overrides)
        found[effort] = _checked(chosen, path, allow_outside)
    recipe, problems = found[effort][0], [*mistyped, *found[DEFAULT][1]]
    for name, (_, own) in found.items():
        problems += [_at_effort(problem, name) for problem in own if problem not in common]
    if problems or recipe is None:
        problems = list(dict.fromkeys(problems))
        raise RecipeError(sorted(problems, key=lambda problem: (problem.line, problem.column)))
    recipe._effort = effort
    return recipe


def load_efforts(
    path_or_name: str | Path, overrides: Sequence[str] = (), *, allow_outside: bool = False
) -> dict[EffortName, Recipe]:
    """A recipe at all its efforts, to compare them, but for those that overrides do not fit.

    Raises:
        RecipeError: anything is wrong with it as written.
    """
    path = find_recipe(path_or_name)
    recipes: dict[EffortName, Recipe] = {}
    for name in _choices(path_or_name, path):
        with suppress(RecipeError):
            recipes[name] = load_recipe(
                path_or_name, overrides, effort=name, allow_outside=allow_outside
            )
    return recipes


def _choices(path_or_name: str | Path, path: Path) -> dict[EffortName, Source]:
    """The parsed file at each of its efforts."""
    shown = str(path_or_name) if Path(path_or_name).is_file() else path.name
    return apart(read_source(read_text(path), shown))


def _override(source: Source, overrides: Sequence[str]) -> list[Problem]:
    """Apply `--set`, which comes after the efforts; what is wrong with it."""
    early = [text for text in overrides if text.partition(".")[0].partition("=")[0] == KEY]
    hint = "set the key itself, and choose with --effort"
    problems = [
        Problem(f"--set {text}: the effort is merged before, so that this has no effect", hint=hint)
        for text in early
    ]
    try:
        apply_overrides(source, [text for text in overrides if text not in early])
    except RecipeError as error:
        problems += error.problems
    return problems


def _at_effort(problem: Problem, effort: EffortName) -> Problem:
    """The problem, with the effort that has it where that is not the recipe's own."""
    if effort == DEFAULT:
        return problem
    return replace(problem, message=f"at effort {effort}: {problem.message}")


def budget_overrides(
    path_or_name: str | Path, *, effort: EffortName = DEFAULT, **budget: object
) -> list[str]:
    """The overrides that give a recipe's `allocate.bits` another budget.

    Args:
        path_or_name: of the recipe.
        effort: at which the recipe is read.
        budget: `target_bpw` and `target_size`; None for the one that is not meant.

    Raises:
        RecipeError: the recipe cannot be read, or no stage of it allocates bits.
    """
    path = find_recipe(path_or_name)
    source = _choices(path_or_name, path).get(effort)
    data = source.data if source else None
    stages = data.get("stages") if isinstance(data, dict) else None
    for index, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict) and stage.get("method") == "allocate.bits":
            return [
                f"stages.{index}.{key}={'null' if value is None else value}"
                for key, value in budget.items()
            ]
    message = f"{path.name} has no allocate.bits stage that a budget could be given to"
    raise RecipeError([Problem(message, hint="compress mixed-3.5 MODEL --target-bpw 3.5")])


def find_recipe(path_or_name: str | Path) -> Path:
    """The file of a recipe given by path or by shipped name.

    Raises:
        RecipeError: neither exists.
    """
    path = Path(path_or_name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    name = path.name.removesuffix(".yaml")
    if name in shipped and str(path.parent) in {".", "recipes"}:
        return shipped[name]
    near = nearest(name, shipped)
    guess = f"; did you mean {near!r}?" if near else ""
    message = f"no recipe {str(path)!r}: neither a file nor a shipped recipe{guess}"
    hint = "compress ls recipes"
    if path.is_dir():
        message = (
            f"{str(path)!r} is a folder; a recipe is a YAML file, or the name of a shipped one"
        )
        hint = f"compress resume {path}" if (path / "recipe.lock.yaml").is_file() else hint
    raise RecipeError([Problem(message, hint=hint)])


def shipped_recipes() -> dict[str, Path]:
    """Name -> file of the recipes that come with the package."""
    return {path.stem: path for path in sorted(resources.recipes().glob("*.yaml"))}


def _checked(
    source: Source, path: Path, allow_outside: bool
) -> tuple[Recipe | None, list[Problem]]:
    """Turn parsed YAML into a recipe, or say everything that is wrong with it.

    Args:
        source: the parsed text; its paths are made absolute in place.
        path: file of the recipe; relative paths in it start from its folder.
        allow_outside: let the recipe name files outside that folder.
    """
    if isinstance(source.data, dict):
        source.data.setdefault("name", re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).lstrip("-._"))
    problems = resolve_paths(source, path.resolve().parent, allow_outside)
    model = recipe_model()
    try:
        # JSON is the strict input form in which a list may still become a tuple.
        recipe = model.model_validate_json(json.dumps(source.data), strict=True)
    except ValidationError as error:
        return None, [*diagnose(error, model, source), *problems, *_besides(source)]
    recipe._source = source
    return recipe, [*problems, *recipe.problems()]


def _besides(source: Source) -> list[Problem]:
    """What is wrong beside the form: the order of stages, and text that sections name."""
    data = source.data if isinstance(source.data, dict) else {}
    stages = data.get("stages")
    given = [
        stage.get("method") if isinstance(stage, dict) else None
        for stage in (stages if isinstance(stages, list) else [])
    ]
    known = tuple(method.name for method in registry())  # what is given may be no string
    methods = [method if method in known else "" for method in given]
    calibration = _sound(CalibrationConfig, data.get("calibration"), {"samples": 1, "length": 8})
    evaluate = _sound(EvaluateConfig, data.get("evaluate"), {})
    return [
        *order_problems(methods, source.problem),
        *text_problems(calibration, evaluate, source.problem),
    ]


def _sound(kind: type[BaseModel], data: Any, instead: Mapping[str, Any]) -> Any:
    """A section without its keys that are wrong; None where that leaves none.

    Args:
        kind: of section.
        data: as written.
        instead: values of keys without which defaults would ask for too much.
    """
    try:
        return kind.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        wrong = {str(fault["loc"][0]) for fault in error.errors() if fault["loc"]}
    if not wrong or not isinstance(data, dict):
        return None
    kept = {key: value for key, value in data.items() if key not in wrong}
    return _sound(kind, {key: instead[key] for key in wrong & instead.keys()} | kept, {})


def _idle(recipe: Recipe) -> list[Problem]:
    """A recipe that changes nothing."""
    if recipe.stages or any(export.rounds for export in recipe.export):
        return []
    return [
        recipe.problem(
            ("stages",),
            "stages in the recipe needs at least one entry",
            "or an export that rounds by itself: {format: gguf, type: Q4_K_M}",
        )
    ]


def _unread(recipe: Recipe) -> list[Problem]:
    """Options that have no effect; a default spelled out, as in a lock file, says nothing."""
    return [
        recipe.problem(
            ("stages", index, option),
            f"{stage.method}.{option} has no effect without `{need}`",
            "leave it out, or write that too",
        )
        for index, stage in enumerate(recipe.stages)
        for option, need in stage.unread().items()
        if getattr(stage, option) != type(stage).model_fields[option].default
    ]


def _misplaced(recipe: Recipe) -> list[Problem]:
    """Grids typed for a stage that only foretells them; efforts have other stages at a place."""
    return [
        recipe.problem(
            ("stages", index, option),
            f"{stage.method}: {sentence}",
            _at_rounder(recipe, index, option),
        )
        for index, stage in enumerate(recipe.stages)
        for option, sentence in stage.misjudged(recipe.stages[index + 1 :]).items()
        if recipe.typed(("stages", index, option))
    ]


def _at_rounder(recipe: Recipe, index: int, option: str) -> str:
    """Where to type what was typed for a stage that only foretells it."""
    later = enumerate(recipe.stages[index + 1 :], index + 1)
    place, rounder = next((place, stage) for place, stage in later if stage.rounds_weights)
    if not hasattr(rounder, option):
        return "leave it out"
    value = getattr(recipe.stages[index], option)
    return f"{rounder.method} rounds, at place {place}: --set stages.{place}.{option}={value} too"


def _needs(recipe: Recipe) -> list[Problem]:
    """Stages and exports that need calibration text in a recipe that names none."""
    if recipe.calibration is not None:
        return []
    needs = [(index, stage.calibration_need()) for index, stage in enumerate(recipe.stages)]
    weighed = [
        recipe.problem(
            ("export", index, "type"),
            f"{export.type} is weighed by an importance matrix, and the recipe has no "
            "`calibration` to measure one on",
            "add a `calibration:` section, or `imatrix: false` here",
        )
        for index, export in enumerate(recipe.export)
        if export.type and export.imatrix
    ]
    return weighed + [
        recipe.problem(
            ("stages", index, need.option),
            f"{need.reason}, and the recipe has no `calibration`",
            "add a `calibration:` section; compress explain calibration",
        )
        for index, need in needs
        if need
    ]


def recipe_json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of a recipe, for editors."""
    schema = recipe_model().model_json_schema()
    for definition in schema["$defs"].values():
        # The method tells stages apart, so leaving it out is an error although it has a default.
        if "const" in definition.get("properties", {}).get("method", {}):
            definition.setdefault("required", []).insert(0, "method")
    rounding = {"properties": {"type": {"type": "string"}}, "required": ["type"]}
    schema["anyOf"] = [  # as `_idle` has it
        {"properties": {"stages": {"minItems": 1}}},
        {"properties": {"export": {"contains": rounding}}, "required": ["export"]},
    ]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **schema,
        "title": "Recipe of the compressor",
    }


def dump_lock(recipe: Recipe, facts: Lock, folder: Path) -> str:
    """A recipe that pins every default and what the run was made of.

    Args:
        recipe: as it ran.
        facts: model, hashes and versions.
        folder: where the text will be stored; paths are written relative to it.
    """
    content = recipe.model_dump(mode="json", exclude={"lock"})
    for _, container, key in written_paths(content, folder):
        container[key] = os.path.relpath(container[key], folder)
    content["lock"] = facts.model_dump(mode="json")
    heading = "# Written by a run. `compress` with this file and the same model repeats it.\n"
    return heading + _dump_yaml(content)


def _dump_yaml(content: dict[str, Any]) -> str:
    yaml = YAML(typ="rt")
    yaml.width = 100
    buffer = io.StringIO()
    yaml.dump(content, buffer)
    return buffer.getvalue()
