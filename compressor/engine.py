"""Carry out a plan: stages, verification, evaluation, export, report. Resumes by itself.

The engine is the only writer of a run's directory:

    recipe.yaml         the recipe, verbatim
    recipe.lock.yaml    the same with every default, and hashes of what went in
    journal.jsonl       what is done, one line an event
    stages/NN-method/   the checkpoint and codes that each stage leaves
    deliverable/FORMAT/ what engines load
    deliverable/draft/  the first draft model; others carry the name of their stage. Beside a
                        GGUF export also as gguf/model.gguf
    evaluations/        token scores and results of every variant
    report.json, report.html, README.md, figures/
    scratch/            activations and hidden states; gone when the run is done

Each step is journaled when its result is on disk. Running the same command again skips what
the journal holds; a run killed at any moment therefore ends with the bytes of one that was not.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from compressor.chain import Chain
from compressor.claim import exclusive, refuse_changes, require_disk, require_empty
from compressor.deliverables import Deliverables
from compressor.errors import ModelError, ResumeError
from compressor.facts import build_facts
from compressor.following import require_shares
from compressor.formats import exporters
from compressor.formats.atomic import atomic_write_text
from compressor.formats.files import checkpoint_files
from compressor.interrupts import Interruptible
from compressor.journal import Journal
from compressor.model.load import (
    ModelSource,
    read_config,
    read_licence,
    resolve,
)
from compressor.original import require_sound
from compressor.plan import make_plan
from compressor.progress import Observer, SilentObserver
from compressor.provenance import file_sha256, packages
from compressor.publish import Publication, publish, require_access
from compressor.recipe import Recipe, dump_lock, load_recipe
from compressor.report.build import build_report
from compressor.report.render import write_report
from compressor.report.schema import Report
from compressor.sections import ExportConfig, Lock
from compressor.state import RunState
from compressor.team import ALONE, Team

_DAMAGED_RUN = "files of the run were changed; restore them, or start again in another with -o"


@dataclass(frozen=True)
class RunOutcome:
    """A finished run.

    Attributes:
        folder: its directory.
        report: as written.
    """

    folder: Path
    report: Report

    @property
    def verdict(self) -> str:
        """PASS, FAIL, INCONCLUSIVE or NO GATES."""
        return self.report.verdict

    def publish(self, repo: str, **options: Any) -> Publication:
        """Publish on the Hub; see `compressor.publish.publish`."""
        return publish(self.folder, repo, **options)


def run_recipe(
    recipe: Recipe,
    model: str,
    out: Path,
    *,
    observer: Observer | None = None,
    command: str = "",
    team: Team = ALONE,
) -> RunOutcome:
    """Run a recipe on a model, or take up the run that `out` holds where it stopped.

    Args:
        recipe: what to do.
        model: `builtin:<name>`, a directory or a Hub id.
        out: directory of the run.
        observer: told of progress.
        command: as typed, for the report.
        team: processes that wait to run stages that train beside this one, which leads them.

    Raises:
        PlanError: the chain cannot work on this model.
        UsageError: stages that train cannot be shared by so many processes.
        ResumeError: `out` holds a run of something else.
        ResourceError: the disk does not suffice.
        VerificationError: a stage or an export broke a promise.
        AccessError: the recipe publishes, and may not.
    """
    require_shares(recipe, team)
    source = resolve(model)
    plan = make_plan(recipe, read_config(source.path), model)
    require_sound(source.path)
    for export in recipe.export:  # no stage changes what is checked here, say the tokenizer
        exporters.exporter(export.format).check(source.path)
    require_disk(out, plan.disk_bytes)
    require_publishable(recipe, source)
    told = observer or SilentObserver()
    with exclusive(out):
        outcome = _Run(RunState(recipe, source, plan, out, told, command), team).execute()
    _publish(recipe, outcome, told)
    return outcome


def require_publishable(recipe: Recipe, source: ModelSource) -> None:
    """Refuse a recipe that publishes what may not be published; asks the Hub.

    Raises:
        AccessError: the licence or the token does not allow it.
        ResourceError: the Hub cannot be reached.
    """
    if recipe.publish is not None:
        licence = read_licence(source.path)
        require_access(recipe.publish.repo, licence, public=recipe.publish.public)


def _publish(recipe: Recipe, outcome: RunOutcome, observer: Observer) -> None:
    """Publish a run that its gates do not speak against; the same command goes on."""
    if recipe.publish is None:
        return
    if outcome.verdict in ("FAIL", "INCONCLUSIVE"):
        observer.event("not published", verdict=outcome.verdict)
        return
    target = recipe.publish
    done = publish(outcome.folder, target.repo, pr=target.pr, public=target.public)
    for repository in done.repositories:
        revision = done.revisions[repository.name]
        observer.event("published", repository=repository.name, revision=revision)


def resume_run(out: Path, *, observer: Observer | None = None, team: Team = ALONE) -> RunOutcome:
    """Take up a run from its directory alone.

    Raises:
        ResumeError: there is no run.
    """
    recipe, lock = _recorded(out)
    command = _first_command(out)
    return run_recipe(recipe, lock.model, out, observer=observer, command=command, team=team)


def export_run(
    out: Path, added: Sequence[ExportConfig], *, observer: Observer | None = None
) -> RunOutcome:
    """Add deliverables to a run; what is done is not done again, and the report is written anew.

    They belong to the run once all of them are verified: one that fails leaves the run as it was.

    Args:
        out: directory of the run.
        added: formats that it does not have.
        observer: told of progress.

    Raises:
        ResumeError: there is no run, or none that is finished.
        UsageError: it has one of the formats already.
        PlanError: the chain cannot be exported so.
    """
    recipe, lock = _recorded(out)
    if Journal(out / "journal.jsonl").find("report_written") is None:
        raise ResumeError(f"the run in {out} is not finished", f"compress resume {out}")
    changed, command = recipe.with_exports(added), _first_command(out)
    return run_recipe(changed, lock.model, out, observer=observer, command=command)


def _first_command(out: Path) -> str:
    """What began a run, as typed."""
    starts = Journal(out / "journal.jsonl").all("run_started")
    return starts[0]["command"] if starts else ""


def _recorded(out: Path) -> tuple[Recipe, Lock]:
    """The recipe of a run with every default, and what the run was made of."""
    path = out / "recipe.lock.yaml"
    if not path.is_file():
        raise ResumeError(
            f"{out} holds no run (no recipe.lock.yaml)", "compress RECIPE MODEL -o DIR"
        )
    recipe = load_recipe(path, allow_outside=True)
    if recipe.lock is None:
        raise ResumeError(
            f"{path} has no `lock`, which says what the run was made of", _DAMAGED_RUN
        )
    return recipe, recipe.lock


class _Run:
    """One run: its parts in order, each skipped when the journal says it is done."""

    def __init__(self, state: RunState, team: Team) -> None:
        self.state = state
        self.team = team
        self.signature = _signature(state.source.path)
        self.recorded = state.recipe  # as the run on disk has it

    def execute(self) -> RunOutcome:
        """Do what is left to do."""
        self._claim()
        journal = self.state.journal
        resumed = journal.find("run_started") is not None
        written = {path.name: file_sha256(path) for path in self._recipes()}
        journal.append("run_started", command=self.state.command, resumed=resumed, written=written)
        try:
            with Interruptible() as interruptible, _damage_told(self.state.folder / "stages"):
                return self._steps(interruptible)
        except BaseException as error:
            self._drop_added()
            if isinstance(error, KeyboardInterrupt):
                journal.append("interrupted")
            raise
        finally:
            if journal.find("report_written"):
                shutil.rmtree(self.state.folder / "scratch", ignore_errors=True)

    def _steps(self, interruptible: Interruptible) -> RunOutcome:
        state = self.state
        chain, deliverables = Chain(state, self.team, interruptible), Deliverables(state)
        state.evaluate(state.last)
        for index, stage in enumerate(state.recipe.stages):
            chain.add(index, stage)
        self._require_unchanged_model()
        for export in state.recipe.export:
            deliverables.add(export)
        self._record_added()
        report = build_report(build_facts(state))
        write_report(report, state.folder)
        state.journal.append("report_written", verdict=report.verdict)
        state.observer.event("done", verdict=report.verdict, report=state.folder / "report.html")
        return RunOutcome(state.folder, report)

    def _claim(self) -> None:
        """Write the lock of a new run; refuse one that was made of something else."""
        recipe, folder, lock = self.state.recipe, self.state.folder, self._lock()
        path = folder / "recipe.lock.yaml"
        if recipe.lock:
            refuse_changes("the lock file was made of something else", recipe, recipe, lock)
        if path.exists():
            self._require_unedited()
            self.recorded, _ = _recorded(folder)
            what = f"{folder} holds a run of something else"
            refuse_changes(what, self.recorded.begun(), recipe.begun(), lock)
            if later := [one for one in self.recorded.export if one not in recipe.export]:
                self.state.recipe = recipe.with_exports(later)
        else:
            require_empty(folder)
            session = self.state.session
            _ = session.scorer(self.state.source.path), session.settings  # refuse what they cannot
            atomic_write_text(path, dump_lock(recipe, lock, folder))
        if not (folder / "recipe.yaml").exists():  # the lock, which comes first, makes it ours
            atomic_write_text(folder / "recipe.yaml", recipe.text())

    def _lock(self) -> Lock:
        source, calibration = self.state.source, self.state.calibration
        hashes = {file.path: file.sha256 for file in self.state.base_files}
        return Lock(
            model=source.id,
            revision=source.revision,
            config_sha256=hashes["config.json"],
            weights={name: sha for name, sha in hashes.items() if name.endswith(".safetensors")},
            calibration_sha256=calibration.sha256 if calibration else None,
            packages=packages(),
            effort=self.state.recipe.effort,
            added=self.state.recipe.lock.added if self.state.recipe.lock else (),
        )

    def _recipes(self) -> list[Path]:
        """The recipe as written, and with every default."""
        return [self.state.folder / name for name in ("recipe.yaml", "recipe.lock.yaml")]

    def _require_unedited(self) -> None:
        """Refuse to go on with a recipe that is not the one that the journal knows."""
        for path in self._recipes():
            events = [event for event in self.state.journal.events if "written" in event]
            known = {event["written"].get(path.name) for event in events}
            if known and path.exists() and file_sha256(path) not in known:
                raise ResumeError(
                    f"{path} was changed since the run wrote it, and a run is of one recipe",
                    "undo the change; or run what it says now elsewhere: "
                    f"compress {path} MODEL -o DIR",
                )

    def _added(self) -> list[ExportConfig]:
        """Deliverables that the run on disk does not have yet."""
        return [one for one in self.state.recipe.export if one not in self.recorded.export]

    def _record_added(self) -> None:
        """From now on they belong to the run."""
        added = [export.name for export in self._added()]
        if not added:
            return
        recipe, lock = self._recipes()
        note = "".join(f"# added by `compress export`: {name}\n" for name in added)
        texts = {
            lock: dump_lock(self.state.recipe, self._lock(), self.state.folder),
            recipe: recipe.read_text(encoding="utf-8").rstrip("\n") + f"\n{note}",
        }
        written = {path.name: sha256(text.encode()).hexdigest() for path, text in texts.items()}
        self.state.journal.append("exports_added", formats=added, written=written)
        for path, text in texts.items():
            atomic_write_text(path, text)
        self.recorded = self.state.recipe

    def _drop_added(self) -> None:
        """A run that could not be added to is what it was."""
        for export in self._added():
            shutil.rmtree(self.state.folder / "deliverable" / export.name, ignore_errors=True)
            for path in (self.state.folder / "evaluations").glob(f"{export.name}.*"):
                path.unlink()

    def _require_unchanged_model(self) -> None:
        """The original is read again and again during a run; it must stay what was hashed."""
        path = self.state.source.path
        if _signature(path) != self.signature:
            raise ResumeError(
                f"{path} changed while the run was reading it",
                "start again in another folder with -o",
            )


@contextmanager
def _damage_told(stages: Path) -> Iterator[None]:
    """What is wrong with a file of a stage is no matter of a model to be downloaded again."""
    try:
        yield
    except ModelError as error:
        if str(stages) not in error.message:
            raise
        raise ResumeError(error.message, _DAMAGED_RUN) from error


def _signature(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file of a checkpoint."""
    stats = {path.name: path.stat() for path in checkpoint_files(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
