"""Write what an engine said into the report of a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from compressor.claim import exclusive
from compressor.journal import Journal
from compressor.report.build import build_report
from compressor.report.render import load_report, write_report
from compressor.report.schema import Artifact, EngineCheck, Facts, Report

EVENT = "engine_checked"


def record(run: Path, checks: Sequence[EngineCheck]) -> Report:
    """Put checks into the journal and the report; a later one of the same files replaces one.

    Raises:
        ResumeError: another process is writing the run.
        UsageError: the run has no report.
    """
    with exclusive(run):
        journal = Journal(run / "journal.jsonl")
        for check in checks:
            record_event(journal, check)
        report = load_report(run)
        facts = {name: getattr(report, name) for name in Facts.model_fields}
        facts["engine_checks"] = checks_of(journal, report.deliverables)
        rebuilt = build_report(Facts(**facts))
        write_report(rebuilt, run)
        return rebuilt


def record_event(journal: Journal, check: EngineCheck) -> None:
    """Put a check into the journal."""
    journal.append(EVENT, check=check.model_dump(mode="json"))


def checks_of(journal: Journal, artifacts: Iterable[Artifact]) -> tuple[EngineCheck, ...]:
    """The latest check of each engine and deliverable, of the files as they are now."""
    present = {artifact.sha256 for artifact in artifacts}
    found: dict[tuple[str, str], EngineCheck] = {}  # by engine and files
    for event in journal.all(EVENT):
        check = EngineCheck.model_validate(event["check"])
        if check.sha256 in present:
            found[check.engine, check.sha256] = check
    return tuple(found.values())
