"""Commands that make something: runs, deliverables, publications."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor import console
from compressor.commands.options import FOLDER, Settings, common, finish, recipe_options, working
from compressor.errors import CompressorError, RecipeError, UsageError, VerificationError
from compressor.team import Team, assembled
from compressor.types import Problem

if TYPE_CHECKING:
    from pydantic import ValidationError

    from compressor.efforts import EffortName
    from compressor.engine import RunOutcome
    from compressor.progress import Observer


@click.command()
@recipe_options
@click.option(
    "-o",
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    help="Directory of the run.",
)
@common
@click.pass_obj
def run(
    settings: Settings,
    /,
    recipe: str,
    model: str,
    out: Path | None,
    **reading: Any,
) -> None:
    """Run RECIPE on MODEL; the same command again resumes it."""
    from compressor.recipe import load_recipe

    with _model_too(recipe, model):
        loaded = load_recipe(recipe, **_reading(recipe, **reading))
    folder = out or default_out(loaded.name, model, loaded.effort)

    def job(observer: Observer, team: Team) -> RunOutcome:
        from compressor.engine import run_recipe

        command = settings.command
        return run_recipe(loaded, model, folder, observer=observer, command=command, team=team)

    _together(settings, job)


@click.command()
@click.argument("folder", type=FOLDER)
@common
@click.pass_obj
def resume(settings: Settings, folder: Path) -> None:
    """Take up the interrupted run in FOLDER."""

    def job(observer: Observer, team: Team) -> RunOutcome:
        from compressor.engine import resume_run

        return resume_run(folder, observer=observer, team=team)

    _together(settings, job)


def _together(settings: Settings, job: Callable[[Observer, Team], RunOutcome]) -> None:
    """Do a job on the leading process of a launch, which alone speaks; others follow it."""
    with working(settings) as observer, assembled() as team:
        if not team.leads:
            _follow(team)
            return
        outcome = job(observer, team)
        team.hear(None)
    finish(settings, outcome)


def _follow(team: Team) -> None:
    from compressor.following import follow

    try:
        follow(team)
    except CompressorError as error:
        click.echo(f"process {team.rank}: {error}", err=True)
        sys.exit(error.exit_code)


@click.command()
@recipe_options
@common
@click.pass_obj
def plan(
    settings: Settings,
    /,
    recipe: str,
    model: str,
    **reading: Any,
) -> None:
    """Check RECIPE against MODEL and price it, at every effort; reads no weight."""
    from compressor.model.load import read_config, resolve
    from compressor.original import require_sound
    from compressor.plan import make_plan
    from compressor.recipe import load_efforts, load_recipe

    with _model_too(recipe, model):
        chosen = _reading(recipe, **reading)
        loaded = load_recipe(recipe, **chosen)
    source = resolve(model, config_only=True)
    config = read_config(source.path)
    del chosen["effort"]
    require_sound(source.path)
    made = make_plan(loaded, config, model).beside(load_efforts(recipe, **chosen), config)
    if loaded.publish is not None:
        from compressor.engine import require_publishable

        require_publishable(loaded, source)
    settings.emit(made.model_dump(), lambda: console.plan_text(made))


@contextmanager
def _model_too(recipe: str, model: str) -> Iterator[None]:
    """Tell, with what is wrong with a recipe, what is wrong with the model that it is for."""
    from compressor.recipe import find_recipe

    find_recipe(recipe)  # a name that is wrong needs no model
    try:
        yield
    except RecipeError as wrong:
        from compressor.model.load import resolve
        from compressor.original import require_sound

        try:
            require_sound(resolve(model, config_only=True).path)
        except CompressorError as also:
            raise RecipeError([*wrong.problems, Problem(also.message, hint=also.hint)]) from None
        raise


def _reading(
    recipe: str, *, effort: EffortName, overrides: Sequence[str], allow_outside: bool, **budget: Any
) -> dict[str, Any]:
    """How to read a recipe; a budget is short for --set of its stage's options."""
    from compressor.recipe import budget_overrides

    given = [name for name, value in budget.items() if value is not None]
    if len(given) > 1:
        raise UsageError("--target-bpw and --target-size are two budgets", "give one of them")
    bpw = budget["target_bpw"]
    if bpw is not None and not math.isfinite(bpw):
        raise UsageError(f"--target-bpw must be a finite number, not {bpw}", "--target-bpw 3.5")
    if given:
        overrides = [*overrides, *budget_overrides(recipe, effort=effort, **budget)]
    return {"effort": effort, "overrides": overrides, "allow_outside": allow_outside}


def default_out(recipe: str, model: str, effort: EffortName = "default") -> Path:
    """`runs/RECIPE-MODEL`, with an effort of choice between: the same command finds its run."""
    recipe += "" if effort == "default" else f"-{effort}"
    bare = model.partition("@")[0].rstrip("/\\").replace("\\", "/")
    name = bare.rpartition("/")[2].rpartition(":")[2]
    return Path("runs") / f"{recipe}-{name or 'model'}"


def _wanted(
    formats: tuple[str, ...], form: str | None, types: tuple[str, ...], embedding: str | None
) -> Iterator[dict[str, str]]:
    """Deliverables as a recipe would name them."""
    for option, value, name, example in (
        ("--form", form, "compressed-tensors", "int-quantized"),
        ("--type", types, "gguf", "Q4_K_M"),
        ("--embedding", embedding, "gguf", "Q8_0"),
    ):
        if value and name not in formats:
            raise UsageError(
                f"{option} is for --as {name}",
                f"compress export RUN --as {name} {option} {example}",
            )
    rounded = {"embedding": embedding} if embedding else {}
    extra = {"form": form} if form else {}
    for name in formats:
        if name != "gguf":
            yield {"format": name, **(extra if name == "compressed-tensors" else {})}
        elif types:
            yield from ({"format": name, "type": kind, **rounded} for kind in types)
        else:
            yield {"format": name, **rounded}


def _told(error: ValidationError) -> str:
    """Everything that is wrong with a deliverable; what is wrong with one value, after it."""
    return "\n".join(
        ("" if isinstance(wrong["input"], dict) else f"{wrong['input']!r}: ")
        + wrong["msg"].removeprefix("Value error, ")
        for wrong in error.errors()
    )


@click.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "--as",
    "formats",
    multiple=True,
    required=True,
    metavar="FORMAT",
    help="Such as gguf or gptq; compress ls formats. May be given several times.",
)
@click.option("--form", help="Layout of compressed-tensors, such as int-quantized.")
@click.option(
    "--type",
    "types",
    multiple=True,
    metavar="TYPE",
    help="With --as gguf: a type that llama.cpp's quantizer rounds to, such as Q4_K_M; one "
    "deliverable each.",
)
@click.option(
    "--embedding",
    metavar="TYPE",
    help="With --as gguf: round an embedding that the chain left dense, such as Q8_0.",
)
@common
@click.pass_obj
def export(
    settings: Settings,
    folder: Path,
    formats: tuple[str, ...],
    form: str | None,
    types: tuple[str, ...],
    embedding: str | None,
) -> None:
    """Add deliverables to the finished run in FOLDER; nothing is computed again."""
    from pydantic import ValidationError

    from compressor.sections import ExportConfig

    try:
        added = [
            ExportConfig.model_validate(one) for one in _wanted(formats, form, types, embedding)
        ]
    except ValidationError as error:
        raise UsageError(_told(error), "compress ls formats") from None
    with working(settings) as observer:
        from compressor.engine import export_run

        outcome = export_run(folder, added, observer=observer)
    finish(settings, outcome)


@click.command()
@click.argument("folder", type=FOLDER)
@common
@click.pass_obj
def verify(settings: Settings, folder: Path) -> None:
    """Check a checkpoint, or all deliverables of a run, in FOLDER: files, hashes, values, text."""
    from compressor.model.quiet import quiet
    from compressor.recheck import verify_folder

    with quiet():
        checks = verify_folder(folder)
    settings.emit([vars(check) for check in checks], lambda: console.checks_text(checks))
    failed = [check for check in checks if check.passed is False]
    if failed:
        raise VerificationError(f"{failed[0].folder}: {failed[0].name}: {failed[0].detail}")


@click.command()
@click.argument("folder", type=FOLDER)
@click.argument("repo", metavar="ORG/NAME")
@click.option("--dry-run", is_flag=True, help="Say what would be uploaded; touch no network.")
@click.option("--pr", is_flag=True, help="Propose the files as a pull request.")
@click.option("--public", is_flag=True, help="Show the repository to everyone once verified.")
@common
@click.pass_obj
def publish(
    settings: Settings, folder: Path, repo: str, dry_run: bool, pr: bool, public: bool
) -> None:
    """Publish the run in FOLDER on the Hub as ORG/NAME; private unless told otherwise."""
    from compressor.model.quiet import quiet
    from compressor.publish import publish as upload
    from compressor.publish import summary

    with quiet():
        done = summary(upload(folder, repo, dry_run=dry_run, pr=pr, public=public))
    settings.emit(done, lambda: console.publication_text(done))


@click.command()
@click.argument("model", type=click.Path())
@click.option(
    "-o", "--out", type=click.Path(path_type=Path), default="imatrix.gguf", show_default=True
)
@click.option("--mix", help="Calibration mix; compress ls mixes.")
@click.option("--samples", type=int, help="Windows of text.")
@click.option("--length", type=int, help="Tokens of a window.")
@common
@click.pass_obj
def imatrix(settings: Settings, /, model: str, out: Path, **options: Any) -> None:
    """Measure the importance of MODEL's inputs for llama-quantize --imatrix."""
    from pydantic import ValidationError

    from compressor.calibration import CalibrationConfig

    if out.exists():
        raise UsageError(f"{out} exists already", "name another file with -o")
    try:
        text = CalibrationConfig(**{k: v for k, v in options.items() if v is not None})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UsageError(f"--{wrong['loc'][0]}: {wrong['msg']}") from None
    with working(settings) as observer:
        from compressor.importance import write_importance

        path = write_importance(model, out, text, observer)
    settings.emit({"path": str(path)}, lambda: f"{path}: llama-quantize --imatrix {path} …")
