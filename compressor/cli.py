"""The command line. Thin: it parses, calls, prints, and turns errors into exit codes.

    compress RECIPE MODEL [-o DIR] [--set stages.0.bits=3]

Exit codes: 0 done; 1 a fault of ours, or of an engine that was asked; 2 usage, recipe or plan;
3 environment, disk, memory; 4 a quality gate failed; 5 the evidence does not decide a gate;
6 credentials or licence; 130 interrupted (the same command resumes).

Commands import what they need when they run, so that `--help` does not wait for torch.
"""

from __future__ import annotations

import difflib
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import click
from click.shell_completion import CompletionItem

from compressor import __version__, console
from compressor.commands import looking, measuring, running, serving
from compressor.commands.options import Settings, common, complete_recipes, recipe_names
from compressor.disk import hint
from compressor.errors import (
    CompressorError,
    GateFailed,
    GateInconclusive,
    ResourceError,
    UsageError,
)
from compressor.interrupts import Interruptible
from compressor.machine import prefer_huge_pages, sleep_soon

INTERRUPTED = 130
_YAML = (".yaml", ".yml")
_COMMANDS = (
    running.run,
    running.resume,
    running.plan,
    running.export,
    running.verify,
    serving.serve_check,
    running.publish,
    running.imatrix,
    measuring.evaluate,
    measuring.compare,
    measuring.report,
    looking.ls,
    looking.show,
    looking.copy,
    looking.schema,
    looking.explain,
    looking.doctor,
    looking.version,
)


class RoutingGroup(click.Group):
    """A group whose first argument may be a recipe, which means `run`."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command; a recipe's path or name stands for `run` of it."""
        word = args[0]
        if word in self.commands or word.startswith("-"):
            return super().resolve_command(ctx, args)
        if word.endswith(_YAML) or "/" in word or Path(word).exists() or word in recipe_names():
            return super().resolve_command(ctx, ["run", *args])
        near = difflib.get_close_matches(word, [*self.commands, *recipe_names()], n=1)
        guess = f" Did you mean {near[0]!r}?" if near else ""
        raise click.UsageError(f"No command and no recipe is called {word!r}.{guess}", ctx)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Commands and, because they stand for `run`, recipes."""
        return super().shell_complete(ctx, incomplete) + complete_recipes(ctx, None, incomplete)


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


for _command in _COMMANDS:
    cli.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `compress`; leaves with one of the documented exit codes."""
    argv = list(sys.argv[1:] if args is None else args)
    settings = Settings(argv=argv)
    prefer_huge_pages()
    sleep_soon()
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
    return ResourceError(
        f"{error.filename}: {reason}" if error.filename else reason, hint(error.errno)
    )


def _report_data(settings: Settings, error: CompressorError) -> None:
    """The error on standard output, for a program, unless the result is there already."""
    if settings.format == "json" and not settings.told:
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
