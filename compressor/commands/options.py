"""What commands share: options, completion, progress, and the verdict of gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem

from compressor import console, resources
from compressor.errors import GateFailed, GateInconclusive

if TYPE_CHECKING:
    from compressor.progress import Observer

FOLDER = click.Path(path_type=Path, exists=True, file_okay=False)


@dataclass
class Settings:
    """What applies to every command."""

    format: str = "human"
    quiet: bool = False
    verbose: bool = False
    argv: list[str] = field(default_factory=list)
    told: bool = False  # the result is on standard output

    @property
    def command(self) -> str:
        """The command as typed."""
        return " ".join(["compress", *self.argv])

    def emit(self, data: Any, lines: Callable[[], str]) -> None:
        """Print a result to standard output: as JSON, or as text for a person."""
        self.told = True
        click.echo(console.as_json(data) if self.format == "json" else lines())


def recipe_names() -> list[str]:
    """Of the shipped recipes."""
    return sorted(path.stem for path in resources.recipes().glob("*.yaml"))


def complete_recipes(
    _: click.Context, __: click.Parameter | None, start: str
) -> list[CompletionItem]:
    """Shipped recipes and files that complete `start`."""
    names = [CompletionItem(name) for name in recipe_names() if name.startswith(start)]
    return [*names, CompletionItem(start, type="file")]


def _set(name: str) -> Callable[[click.Context, click.Parameter, Any], None]:
    """A callback that stores a global option wherever on the line it stands."""

    def store(ctx: click.Context, _: click.Parameter, value: Any) -> None:
        if value:
            setattr(ctx.ensure_object(Settings), name, value)

    return store


class _Output(click.Choice[str]):
    """How results are printed; not to be mixed up with the format of a deliverable."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Click's sentence, and which command writes the format that was named."""
        from compressor.sections import ExportFormat

        said = super().get_invalid_choice_message(value, ctx)
        known = value in get_args(ExportFormat)
        return f"{said} compress export RUN --as {value} writes that format." if known else said


def common(command: Callable[..., Any]) -> Callable[..., Any]:
    """Options that every command takes."""
    options = (
        click.option(
            "--format",
            type=_Output(["human", "json"]),
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
        click.argument("recipe", shell_complete=complete_recipes),
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


@contextmanager
def working(settings: Settings) -> Iterator[Observer]:
    """Progress that suits the terminal, and none of transformers' own."""
    from compressor.model.quiet import quiet
    from compressor.progress import observer

    with quiet(), observer(quiet=settings.quiet) as told:
        yield told


def finish(settings: Settings, outcome: Any) -> None:
    """Print the result of a run; a failed or undecided gate decides the exit code."""
    settings.emit(console.outcome(outcome), lambda: console.outcome_text(outcome))
    judge(outcome.verdict, f"see {outcome.folder / 'report.html'}")


def judge(verdict: str, hint: str) -> None:
    """A failed or undecided gate leaves with the exit code of its own."""
    if verdict == "FAIL":
        raise GateFailed("a quality gate failed", hint)
    if verdict == "INCONCLUSIVE":
        raise GateInconclusive("the evidence does not decide a quality gate", hint)
