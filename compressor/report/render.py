"""Files of a report: `report.json` is the source, everything else is rendered from it alone."""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from compressor.errors import UsageError
from compressor.formats.atomic import atomic_write_text
from compressor.report import palette
from compressor.report.build import check_evidence, check_report
from compressor.report.card import to_markdown
from compressor.report.figures import figures
from compressor.report.html import to_html
from compressor.report.schema import SCHEMA_VERSION, Report
from compressor.report.text import to_text

JSON = "report.json"


def to_json(report: Report) -> str:
    """`report.json`; keys keep their order, since domains and variants have one."""
    document = report.model_dump(mode="json")
    return json.dumps(document, ensure_ascii=False, indent=1, allow_nan=False) + "\n"


FORMATS = {"html": to_html, "md": to_markdown, "json": to_json, "text": to_text}


def rendered(report: Report) -> dict[str, str]:
    """Every file that follows from the report, by its path in the folder."""
    files = {"report.html": to_html(report), "README.md": to_markdown(report)}
    for figure in figures(report):
        for name, colours in (("light", palette.LIGHT), ("dark", palette.DARK)):
            files[f"figures/{figure.key}-{name}.svg"] = figure.standalone(colours)
    return files


def write_report(report: Report, folder: Path) -> None:
    """Write `report.json` and everything that follows from it, each file whole or not at all.

    Raises:
        VerificationError: a sentence or a derived value does not follow from the facts.
        ResourceError: the file system refused.
    """
    check_report(report)
    atomic_write_text(folder / JSON, to_json(report))
    _write_rendered(report, folder)


def render_folder(folder: Path) -> Report:
    """Render the files of a folder again from its `report.json`.

    Raises:
        UsageError: `report.json` is missing, broken or of another major version.
        VerificationError: a sentence in it contradicts its numbers.
    """
    report = load_report(folder)
    _write_rendered(report, folder)
    return report


def _write_rendered(report: Report, folder: Path) -> None:
    files = rendered(report)
    for name, content in files.items():
        atomic_write_text(folder / name, content)
    for path in (folder / "figures").glob("*.svg"):
        if f"figures/{path.name}" not in files:
            path.unlink()


def load_report(folder: Path) -> Report:
    """Read `report.json` and check its sentences against its numbers.

    Raises:
        UsageError: the file is missing, broken or of another major version.
        VerificationError: a sentence in it contradicts its numbers.
    """
    path = folder / JSON
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        report = Report.model_validate(document)
    except OSError as error:
        hint = "name the folder that `compress` wrote to"
        raise UsageError(f"no {JSON} in {folder}: {error.strerror}", hint) from error
    except ValidationError as error:
        first = error.errors()[0]
        place = "/".join(str(part) for part in first["loc"])
        hint = f"this version reads schema {SCHEMA_VERSION} and its minor versions"
        raise UsageError(f"{path} is not a report: /{place}: {first['msg']}", hint) from error
    except ValueError as error:
        raise UsageError(f"{path} is not JSON: {error}") from error
    check_evidence(report)
    return report


def stale_files(folder: Path) -> list[str]:
    """Rendered files that are missing or differ from what `report.json` says.

    Raises:
        UsageError, VerificationError: as `load_report`.
    """
    expected = rendered(load_report(folder))
    return [name for name, text in expected.items() if _read(folder / name) != text]


def _read(path: Path) -> str | None:
    return path.read_bytes().decode("utf-8") if path.is_file() else None
