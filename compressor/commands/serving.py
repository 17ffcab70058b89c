"""Commands that ask inference engines."""

from __future__ import annotations

from pathlib import Path

import click

from compressor import console
from compressor.commands.options import FOLDER, Settings, common, working
from compressor.errors import VerificationError
from compressor.programs import PROGRAMS


@click.command(name="serve-check")
@click.argument("folder", type=FOLDER)
@click.option(
    "--engine",
    type=click.Choice(list(PROGRAMS)),
    required=True,
    help="Which program to ask; it runs in an environment of its own.",
)
@click.option(
    "--at",
    type=click.Path(path_type=Path, exists=True),
    help="Where it is: its virtual environment, its Python, or llama.cpp's folder of programs.",
)
@click.option("--as", "form", metavar="FORMAT", help="Look at the deliverable of this format only.")
@common
@click.pass_obj
def serve_check(
    settings: Settings, folder: Path, engine: str, at: Path | None, form: str | None
) -> None:
    """Ask an engine whether it computes, from the run or checkpoint in FOLDER, what we measured.

    It scores a short text, writes after three prompts and is timed. Exit codes: 0 it does;
    1 it does not; 2 it loads nothing that FOLDER holds; 3 it is not installed. The result goes
    into the run's report.
    """
    with working(settings) as observer:
        from compressor.serving.check import serve_check as ask
        from compressor.serving.record import record

        checks = ask(folder, engine, observer, at=at, form=form)
        if (folder / "report.json").is_file():
            record(folder, checks)
    settings.emit(
        [check.model_dump() for check in checks], lambda: console.engine_checks_text(checks)
    )
    failed = next((check for check in checks if check.verdict == "FAIL"), None)
    if failed:
        raise VerificationError(f"{failed.title} and {failed.format}: {failed.detail}")
