"""The command line. Thin: it parses, calls, prints, and turns errors into exit codes.

    compress RECIPE MODEL [-o DIR] [--set stages.0.bits=3]

Exit codes: 0 done; 1 a fault of ours; 2 usage, recipe or plan; 3 environment, disk, memory;
4 a quality gate failed; 5 the evidence does not decide a gate; 6 credentials or licence;
130 interrupted (the same command resumes).

Commands import what they need when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import click
from click.shell_completion import CompletionItem

from compressor import __version__, console, resources
from compressor.errors import (
    CompressorError,
    GateFailed,
    GateInconclusive,
    RecipeError,
    ResourceError,
    UsageError,
    VerificationError,
)
from compressor.interrupts import Interruptible

if TYPE_CHECKING:
    from compressor.efforts import EffortName
    from compressor.evaluation.config import EvaluateConfig
    from compressor.progress import Observer

INTERRUPTED = 130
_YAML = (".yaml", ".yml")


@dataclass
class Settings:
    """What applies to every command."""

    format: str = "human"
    quiet: bool = False
    verbose: bool = False
    argv: list[str] = field(default_factory=list)

    @property
    def command(self) -> str:
        """The command as typed."""
        return " ".join(["compress", *self.argv])

    def emit(self, data: Any, lines: Callable[[], str]) -> None:
        """Print a result to standard output: as JSON, or as text for a person."""
        click.echo(console.as_json(data) if self.format == "json" else lines())


class RoutingGroup(click.Group):
    """A group whose first argument may be a recipe, which means `run`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a recipe's path or name stands for `run` of it."""
        word = args[0]
        if word in self.commands or word.startswith("-"):
            return super().resolve_command(ctx, args)
        if word.endswith(_YAML) or "/" in word or Path(word).is_file() or word in _recipe_names():
            return super().resolve_command(ctx, ["run", *args])
        near = difflib.get_close_matches(word, [*self.commands, *_recipe_names()], n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise click.UsageError(f"No command and no recipe is called {word!r}.{guess}", ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and, because they stand for `run`, recipes."""
        return super().shell_complete(ctx, incomplete) + _recipes(ctx, None, incomplete)


def _recipe_names() -> list[str]:
    return sorted(path.stem for path in resources.recipes().glob("*.yaml"))


def _recipes(_: click.Context, __: click.Parameter | None, start: str) -> list[CompletionItem]:
    """Shipped recipes and files that complete `start`."""
    names = [CompletionItem(name) for name in _recipe_names() if name.startswith(start)]
    return [*names, CompletionItem(start, type="file")]


def _shipped(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    """Names for `show` and `copy` that complete `start`."""
    return [name for name in console.shipped_names() if name.startswith(start)]


def _topics(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    """Topics of `explain` that complete `start`."""
    from compressor.explain import topics

    return [topic for topic in topics() if topic.startswith(start)]


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that stores a global option wherever on the line it stands."""

    def store(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value:
            setattr(ctx.ensure_object(Settings), name, value)

    return store


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command takes."""
    options = (
        click.option(
            "--format",
            type=click.Choice(["human", "json"]),
            callback=_set("format"),
            is_eager=True,  # an error in any other option is told in this format already
            expose_value=False,
            help="json puts one JSON document, and nothing else, on standard output.",
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            callback=_set("quiet"),
            expose_value=False,
            help="No progress.",
        ),
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            callback=_set("verbose"),
            expose_value=False,
            help="Show the traceback of a crash.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


def recipe_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """A recipe, a model, and how to change the one and trust the other."""
    options = (
        click.argument("recipe", shell_complete=_recipes),
        click.argument("model", type=click.Path()),
        click.option(
            "--effort",
            type=click.Choice(["light", "default", "best"]),
            default="default",
            help="How much time to spend, where the recipe gives the choice; see compress plan.",
        ),
        click.option(
            "--set",
            "overrides",
            multiple=True,
            metavar="PATH=VALUE",
            help="Replace a value of the recipe, for example --set stages.0.bits=3.",
        ),
        click.option(
            "--target-bpw",
            type=float,
            help="Bits per weight for the recipe's allocate.bits stage.",
        ),
        click.option(
            "--target-size",
            metavar="SIZE",
            help="Size of all tensors for the recipe's allocate.bits stage, such as 60MB.",
        ),
        click.option(
            "--allow-outside",
            is_flag=True,
            help="Let the recipe name files outside its own folder.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@click.group(
    cls=RoutingGroup,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="MODEL is a Hub id (org/name[@revision]), a local directory, or builtin:tiny.",
)
@click.version_option(__version__, prog_name="compress", message="%(prog)s %(version)s")
@common
def cli() -> None:
    """Compress a language model by a recipe: compress RECIPE MODEL [-o DIR].

    Shell completion: eval "$(_COMPRESS_COMPLETE=bash_source compress)", or zsh_source,
    fish_source.
    """


# ---------------------------------------------------------------------- runs


@cli.command()
@recipe_options
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Directory of the run.")
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

    loaded = load_recipe(recipe, **_reading(recipe, **reading))
    folder = out or default_out(loaded.name, model, loaded.effort)
    with _working(settings) as observer:
        from compressor.engine import run_recipe

        outcome = run_recipe(loaded, model, folder, observer=observer, command=settings.command)
    _finish(settings, outcome)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@common
@click.pass_obj
def resume(settings: Settings, folder: Path) -> None:
    """Take up the interrupted run in FOLDER."""
    with _working(settings) as observer:
        from compressor.engine import resume_run

        outcome = resume_run(folder, observer=observer)
    _finish(settings, outcome)


@cli.command()
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
    from compressor.plan import make_plan
    from compressor.recipe import load_efforts, load_recipe

    chosen = _reading(recipe, **reading)
    loaded = load_recipe(recipe, **chosen)
    config = read_config(resolve(model, config_only=True).path)
    del chosen["effort"]
    made = make_plan(loaded, config, model).beside(load_efforts(recipe, **chosen), config)
    settings.emit(made.model_dump(), lambda: console.plan_text(made))


def _reading(
    recipe: str, *, effort: EffortName, overrides: Sequence[str], allow_outside: bool, **budget: Any
) -> dict[str, Any]:
    """How to read a recipe; a budget is short for --set of its stage's options."""
    from compressor.recipe import budget_overrides

    given = [name for name, value in budget.items() if value is not None]
    if len(given) > 1:
        raise UsageError("--target-bpw and --target-size are two budgets", "give one of them")
    if given:
        overrides = [*overrides, *budget_overrides(recipe, effort=effort, **budget)]
    return {"effort": effort, "overrides": overrides, "allow_outside": allow_outside}


def default_out(recipe: str, model: str, effort: EffortName = "default") -> Path:
    """`runs/RECIPE-MODEL`, with an effort of choice between: the same command finds its run."""
    recipe += "" if effort == "default" else f"-{effort}"
    bare = model.partition("@")[0].rstrip("/\\").replace("\\", "/")
    name = bare.rpartition("/")[2].rpartition(":")[2]
    return Path("runs") / f"{recipe}-{name or 'model'}"


@contextmanager
def _working(settings: Settings) -> Iterator[Observer]:
    """Progress that suits the terminal, and none of transformers' own."""
    from compressor.model.quiet import quiet
    from compressor.progress import observer

    with quiet(), observer(quiet=settings.quiet) as told:
        yield told


def _finish(settings: Settings, outcome: Any) -> None:
    """Print the result of a run; a failed or undecided gate decides the exit code."""
    settings.emit(console.outcome(outcome), lambda: console.outcome_text(outcome))
    _judge(outcome.verdict, f"see {outcome.folder / 'report.html'}")


def _judge(verdict: str, hint: str) -> None:
    if verdict == "FAIL":
        raise GateFailed("a quality gate failed", hint)
    if verdict == "INCONCLUSIVE":
        raise GateInconclusive("the evidence does not decide a quality gate", hint)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--as",
    "formats",
    multiple=True,
    required=True,
    metavar="FORMAT",
    help="Such as gguf or gptq; compress ls formats. May be given several times.",
)
@click.option("--form", help="Layout of compressed-tensors, such as int-quantized.")
@common
@click.pass_obj
def export(settings: Settings, folder: Path, formats: tuple[str, ...], form: str | None) -> None:
    """Add deliverables to the finished run in FOLDER; nothing is computed again."""
    from pydantic import ValidationError

    from compressor.recipe import ExportConfig

    extra = {"form": form} if form else {}
    try:
        added = [ExportConfig.model_validate({"format": name, **extra}) for name in formats]
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UsageError(f"{wrong['input']!r}: {wrong['msg']}", "compress ls formats") from None
    with _working(settings) as observer:
        from compressor.engine import export_run

        outcome = export_run(folder, added, observer=observer)
    _finish(settings, outcome)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
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


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
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


@cli.command()
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

    try:
        text = CalibrationConfig(**{k: v for k, v in options.items() if v is not None})
    except ValidationError as error:
        wrong = error.errors()[0]
        raise UsageError(f"--{wrong['loc'][0]}: {wrong['msg']}") from None
    with _working(settings) as observer:
        from compressor.importance import write_importance

        path = write_importance(model, out, text, observer)
    settings.emit({"path": str(path)}, lambda: f"{path}: llama-quantize --imatrix {path} …")


# ---------------------------------------------------------------------- measuring


def evaluation_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """How models are measured; what is left out is as in a recipe without `evaluate`."""
    options = (
        click.option("--suite", help="quick, standard, full, or the path of a suite."),
        click.option("--protocol", type=click.Choice(["rolling", "gptq", "llama.cpp"])),
        click.option("--length", type=int, help="Window in tokens."),
        click.option("--documents", type=int, help="Documents per domain."),
        click.option("--batch-size", type=int),
        click.option(
            "--text",
            multiple=True,
            metavar="DOMAIN=FILE",
            help="Your own text in place of the suite's.",
        ),
    )
    for option in reversed(options):
        command = option(command)
    return command


@cli.command(name="eval")
@click.argument("models", nargs=-1, required=True, metavar="BASE [VARIANT]...")
@evaluation_options
@common
@click.pass_obj
def evaluate(settings: Settings, /, models: tuple[str, ...], **options: Any) -> None:
    """Measure BASE, and every VARIANT against it."""
    config = _evaluate_config(options)
    with _working(settings) as observer:
        from compressor.compare import compare_models

        results = compare_models(models, config, observer)
    settings.emit([r.model_dump() for r in results], lambda: console.evaluation_text(results))


@cli.command()
@click.argument("base")
@click.argument("variant")
@click.option(
    "--gate",
    "gates",
    multiple=True,
    metavar="NAME=LIMIT|FILE",
    help="A limit such as max_kl=0.05, or a YAML file of limits.",
)
@evaluation_options
@common
@click.pass_obj
def compare(
    settings: Settings, /, base: str, variant: str, gates: tuple[str, ...], **options: Any
) -> None:
    """Measure VARIANT against BASE and judge it by --gate."""
    config = _evaluate_config(options)
    with _working(settings) as observer:
        from compressor.compare import compare_models, judge_models, read_gates

        limits = read_gates(gates)
        results = compare_models((base, variant), config, observer)
        verdicts, verdict = judge_models(limits, results[-1], variant)
    data = {
        "evaluations": [r.model_dump() for r in results],
        "gates": [v.model_dump() for v in verdicts],
        "verdict": verdict,
    }
    settings.emit(data, lambda: console.evaluation_text(results, verdicts))
    _judge(verdict, "")


def _evaluate_config(options: dict[str, Any]) -> EvaluateConfig:
    from pydantic import ValidationError

    from compressor.diagnose import diagnose
    from compressor.evaluation.config import EvaluateConfig
    from compressor.source import Location, Source

    given = {name: value for name, value in options.items() if value not in (None, ())}
    given["text"] = dict(_text_option(entry) for entry in options["text"])
    try:
        return EvaluateConfig.model_validate(given)
    except ValidationError as error:
        typed: dict[Location, str] = {(name,): "--" + name.replace("_", "-") for name in given}
        source = Source("options", "", given, {}, {}, typed)
        raise RecipeError(diagnose(error, EvaluateConfig, source, root="evaluate")) from None


def _text_option(entry: str) -> tuple[str, str]:
    domain, equals, path = entry.partition("=")
    if not equals:
        raise UsageError(f"--text {entry!r} is not of the form DOMAIN=FILE")
    return domain, path


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option(
    "--as",
    "form",
    type=click.Choice(["text", "md", "html", "json"]),
    default="text",
    help="What to print; --format json is the same as --as json.",
)
@common
@click.pass_obj
def report(settings: Settings, folder: Path, form: str) -> None:
    """Render the page, card and figures of FOLDER anew from its report.json, and print them."""
    from compressor.report.render import FORMATS, render_folder

    loaded = render_folder(folder)
    form = "json" if settings.format == "json" else form
    click.echo(FORMATS[form](loaded).rstrip())


# ---------------------------------------------------------------------- what there is

_KINDS = ("methods", "recipes", "suites", "mixes", "models", "formats", "engines")


@cli.command()
@click.argument("kind", type=click.Choice(_KINDS))
@common
@click.pass_obj
def ls(settings: Settings, kind: str) -> None:
    """List what there is of a KIND."""
    rows = console.listing(kind)
    settings.emit([row._asdict() for row in rows], lambda: console.listing_text(rows))


@cli.command()
@click.argument("name", shell_complete=_shipped)
@common
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Print the shipped recipe, suite or mix called NAME."""
    text = console.shipped_file(name).read_text(encoding="utf-8")
    settings.emit({"name": name, "text": text}, text.rstrip)


@cli.command()
@click.argument("name", shell_complete=_shipped)
@click.argument("destination", required=False, type=click.Path(path_type=Path))
@common
@click.pass_obj
def copy(settings: Settings, name: str, destination: Path | None) -> None:
    """Copy the shipped file called NAME to DESTINATION, to be changed.

    Beside a recipe goes schema.json, by which an editor checks and completes it.
    """
    source = console.shipped_file(name)
    target = destination or Path(source.name)
    target = target / source.name if target.is_dir() else target
    if target.exists():
        raise UsageError(f"{target} exists already", "name another destination")
    text = source.read_text(encoding="utf-8")
    target.write_text(text, encoding="utf-8")
    rules = target.with_name("schema.json")
    if f"$schema=./{rules.name}" in text and not rules.exists():
        rules.write_text(console.as_json(console.json_schema("recipe")) + "\n", encoding="utf-8")
    settings.emit(
        {"path": str(target)}, lambda: f"{target}: edit it, then: compress {target} MODEL"
    )


@cli.command()
@click.argument("of", type=click.Choice(["recipe", "report"]), default="recipe")
@common
def schema(of: str) -> None:
    """Print the JSON Schema of a recipe, for editors, or of report.json."""
    click.echo(console.as_json(console.json_schema(of)))


@cli.command()
@click.argument("topic", default="", shell_complete=_topics)
@common
@click.pass_obj
def explain(settings: Settings, topic: str) -> None:
    """Explain a method, a section or a key: quantize.gptq, evaluate, quantize.gptq.bits."""
    from compressor.explain import explain as look_up

    found = look_up(topic)
    settings.emit(found.model_dump(), lambda: console.topic_text(found))


@cli.command()
@common
@click.pass_obj
def doctor(settings: Settings) -> None:
    """Show versions, machine, and what is missing."""
    from compressor.doctor import examine

    found = examine()
    settings.emit(found, lambda: console.doctor_text(found))


@cli.command()
@common
@click.pass_obj
def version(settings: Settings) -> None:
    """Print the version."""
    settings.emit({"version": __version__}, lambda: __version__)


# ---------------------------------------------------------------------- errors


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `compress`; leaves with one of the documented exit codes."""
    argv = list(sys.argv[1:] if args is None else args)
    settings = Settings(argv=argv)
    sys.excepthook = _crash_hook(settings)
    try:
        with Interruptible():
            code = cli.main(argv, prog_name="compress", standalone_mode=False, obj=settings)
    except click.ClickException as error:
        _report_data(settings, UsageError(error.format_message()))
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; a run is resumed by the same command", err=True)
        code = INTERRUPTED
    except (CompressorError, OSError, MemoryError) as error:
        told = error if isinstance(error, CompressorError) else _environment(error)
        _report_error(settings, told)
        code = told.exit_code
    sys.exit(code if isinstance(code, int) else 0)


def _environment(error: OSError | MemoryError) -> ResourceError:
    """What the machine refused: a full disk, a folder that may not be written, memory."""
    if isinstance(error, MemoryError):
        return ResourceError("not enough memory", "smaller batches need less; see compress plan")
    reason = error.strerror or str(error)
    return ResourceError(f"{error.filename}: {reason}" if error.filename else reason)


def _report_data(settings: Settings, error: CompressorError) -> None:
    """The error on standard output, for a program; after a verdict the result is there already."""
    if settings.format == "json" and not isinstance(error, GateFailed | GateInconclusive):
        click.echo(console.as_json(console.error_data(error)))


def _report_error(settings: Settings, error: CompressorError) -> None:
    _report_data(settings, error)
    label = "" if isinstance(error, GateFailed | GateInconclusive) else "error: "
    label = click.style(label, fg="red", bold=True) if _colour() else label
    click.echo(label + str(error), err=True)


def _colour() -> bool:
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR")


def _crash_hook(
    settings: Settings,
) -> Callable[[type[BaseException], BaseException, TracebackType | None], None]:
    """What happens to an exception nobody foresaw: a log, one line, exit code 1."""

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        text = "".join(traceback.format_exception(kind, error, trace))
        if settings.verbose:
            click.echo(text, err=True)
        with tempfile.NamedTemporaryFile(
            "w", prefix="compress-crash-", suffix=".log", delete=False, encoding="utf-8"
        ) as log:
            log.write(f"{settings.command}\n{text}")
        click.echo(f"{kind.__name__}: {error}", err=True)
        click.echo(f"this is a bug in compressor; the traceback is in {log.name}", err=True)

    return hook


if __name__ == "__main__":
    main()
