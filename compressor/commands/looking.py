"""Commands that show what there is."""

from __future__ import annotations

from pathlib import Path

import click

from compressor import __version__, console
from compressor.commands.options import Settings, common
from compressor.errors import UsageError

_KINDS = ("methods", "recipes", "suites", "mixes", "models", "formats", "engines")


def _shipped(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    """Names for `show` and `copy` that complete `start`."""
    return [name for name in console.shipped_names() if name.startswith(start)]


def _topics(_: click.Context, __: click.Parameter, start: str) -> list[str]:
    """Topics of `explain` that complete `start`."""
    from compressor.explain import topics

    return [topic for topic in topics() if topic.startswith(start)]


@click.command()
@click.argument("kind", type=click.Choice(_KINDS))
@common
@click.pass_obj
def ls(settings: Settings, kind: str) -> None:
    """List what there is of a KIND."""
    rows = console.listing(kind)
    settings.emit([row._asdict() for row in rows], lambda: console.listing_text(rows, kind))


@click.command()
@click.argument("name", shell_complete=_shipped)
@common
@click.pass_obj
def show(settings: Settings, name: str) -> None:
    """Print the shipped recipe, suite or mix called NAME."""
    text = console.shipped_file(name).read_text(encoding="utf-8")
    settings.emit({"name": name, "text": text}, text.rstrip)


@click.command()
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


@click.command()
@click.argument("of", type=click.Choice(["recipe", "report"]), default="recipe")
@common
def schema(of: str) -> None:
    """Print the JSON Schema of a recipe, for editors, or of report.json."""
    click.echo(console.as_json(console.json_schema(of)))


@click.command()
@click.argument("topic", default="", shell_complete=_topics)
@common
@click.pass_obj
def explain(settings: Settings, topic: str) -> None:
    """Explain a method, a family, a section or a key: quantize.gptq, quantize, evaluate, bits."""
    from compressor.explain import explain as look_up

    found = look_up(topic)
    settings.emit(found.model_dump(), lambda: console.topic_text(found))


@click.command()
@common
@click.pass_obj
def doctor(settings: Settings) -> None:
    """Show versions, machine, and what is missing."""
    from compressor.doctor import examine

    found = examine()
    settings.emit(found, lambda: console.doctor_text(found))


@click.command()
@common
@click.pass_obj
def version(settings: Settings) -> None:
    """Print the version."""
    settings.emit({"version": __version__}, lambda: __version__)
