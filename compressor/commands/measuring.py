"""Commands that measure models, and print what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compressor import console
from compressor.commands.options import (
    FOLDER,
    Settings,
    common,
    evaluation_options,
    judge,
    working,
)
from compressor.errors import RecipeError, UsageError

if TYPE_CHECKING:
    from compressor.evaluation.config import EvaluateConfig


@click.command(name="eval")
@click.argument("models", nargs=-1, required=True, metavar="BASE [VARIANT]...")
@evaluation_options
@common
@click.pass_obj
def evaluate(settings: Settings, /, models: tuple[str, ...], **options: Any) -> None:
    """Measure BASE, and every VARIANT against it."""
    config = _evaluate_config(options)
    with working(settings) as observer:
        from compressor.compare import compare_models

        results = compare_models(models, config, observer)
    settings.emit([r.model_dump() for r in results], lambda: console.evaluation_text(results))


@click.command()
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
    with working(settings) as observer:
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
    judge(verdict, "")


def _evaluate_config(options: dict[str, Any]) -> EvaluateConfig:
    from pydantic import ValidationError

    from compressor.diagnose import diagnose
    from compressor.evaluation.config import EvaluateConfig
    from compressor.source import Location, Source

    given = {name: value for name, value in options.items() if value not in (None, ())}
    given["text"] = _texts(options["text"])
    try:
        return EvaluateConfig.model_validate(given)
    except ValidationError as error:
        typed: dict[Location, str] = {(name,): "--" + name.replace("_", "-") for name in given}
        source = Source("options", "", given, {}, {}, typed)
        raise RecipeError(diagnose(error, EvaluateConfig, source, root="evaluate")) from None


def _texts(entries: Sequence[str]) -> dict[str, str]:
    """Files by domain."""
    texts: dict[str, str] = {}
    for entry in entries:
        domain, equals, path = entry.partition("=")
        if not (domain and equals and path):
            raise UsageError(f"--text {entry!r} is not of the form DOMAIN=FILE")
        if domain in texts:
            raise UsageError(
                f"--text names the domain {domain!r} twice: {texts[domain]} and {path}",
                "give every file a domain of its own",
            )
        texts[domain] = path
    return texts


@click.command()
@click.argument("folder", type=FOLDER)
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
