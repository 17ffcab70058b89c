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
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compressor import drafts, requantize
from compressor.calibration import CalibrationSet, build_batches
from compressor.claim import exclusive, refuse_changes, require_disk
from compressor.errors import ModelError, ResumeError
from compressor.evaluation.probe import Probe
from compressor.evaluation.results import Evaluation
from compressor.evaluation.session import BASE, Session
from compressor.facts import Finished, build_facts
from compressor.following import Job, require_shares
from compressor.formats import exporters
from compressor.formats.atomic import atomic_write_text
from compressor.formats.codes import CodesReader
from compressor.formats.files import checkpoint_files
from compressor.interrupts import Interruptible
from compressor.journal import Journal
from compressor.machine import activation_budget
from compressor.meter import Meter
from compressor.model.architecture import Architecture
from compressor.model.load import (
    ModelSource,
    load_tokenizer,
    read_config,
    read_licence,
    resolve,
)
from compressor.plan import Plan, make_plan
from compressor.progress import Observer, SilentObserver
from compressor.provenance import combined_sha256, hash_files, packages
from compressor.publish import Publication, publish, require_access
from compressor.recipe import Recipe, dump_lock, load_recipe
from compressor.reload import unpack
from compressor.report.build import build_report
from compressor.report.render import write_report
from compressor.report.schema import Artifact, Draft, FileHash, Report
from compressor.report.snippets import load_snippets
from compressor.requantize import Requantized
from compressor.sections import ExportConfig, Lock
from compressor.serving.check import prove
from compressor.serving.record import record_event
from compressor.sessions import open_session
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.team import ALONE, Team
from compressor.types import BlockRecord, Fallback
from compressor.variants import Variant, block_record
from compressor.verify import (
    unread_tensors,
    verify_divergence,
    verify_export,
    verify_tensors,
    verify_weights,
)

_NOT_LOADED_WHOLE = Fallback(
    module="model",
    reason="memory does not hold the model whole",
    action="checked block by block; AutoModelForCausalLM was not tried",
)
_DIFFERENCES = ("max_logit_difference", "max_weight_difference", "max_logprob_difference")


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
    for export in recipe.export:  # no stage changes what is checked here, say the tokenizer
        exporters.exporter(export.format).check(source.path)
    require_disk(out, plan.disk_bytes)
    require_publishable(recipe, source)
    told = observer or SilentObserver()
    with exclusive(out):
        outcome = _Run(recipe, source, plan, out, told, command, team).execute()
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
    starts = Journal(out / "journal.jsonl").all("run_started")
    command = starts[0]["command"] if starts else ""
    return run_recipe(recipe, lock.model, out, observer=observer, command=command, team=team)


def export_run(
    out: Path, added: Sequence[ExportConfig], *, observer: Observer | None = None
) -> RunOutcome:
    """Add deliverables to a run; what is done is not done again, and the report is written anew.

    Args:
        out: directory of the run.
        added: formats that it does not have.
        observer: told of progress.

    Raises:
        ResumeError: there is no run.
        UsageError: it has one of the formats already.
        PlanError: the chain cannot be exported so.
    """
    recipe, lock = _recorded(out)
    changed = recipe.with_exports(added)
    make_plan(changed, read_config(resolve(lock.model).path), lock.model)
    with exclusive(out):
        note = "".join(f"# added by `compress export`: {export.name}\n" for export in added)
        text = (out / "recipe.yaml").read_text(encoding="utf-8").rstrip("\n")
        atomic_write_text(out / "recipe.yaml", f"{text}\n{note}")
        atomic_write_text(out / "recipe.lock.yaml", dump_lock(changed, lock, out))
    return resume_run(out, observer=observer)


def _recorded(out: Path) -> tuple[Recipe, Lock]:
    """The recipe of a run with every default, and what the run was made of."""
    path = out / "recipe.lock.yaml"
    if not path.is_file():
        raise ResumeError(
            f"{out} holds no run (no recipe.lock.yaml)", "compress RECIPE MODEL -o DIR"
        )
    recipe = load_recipe(path, allow_outside=True)
    assert recipe.lock is not None
    return recipe, recipe.lock


class _Run:
    """One run: its parts in order, each skipped when the journal says it is done."""

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        plan: Plan,
        folder: Path,
        observer: Observer,
        command: str,
        team: Team,
    ) -> None:
        self.team = team
        self.recipe = recipe
        self.source = source
        self.signature = _signature(source.path)
        self.plan = plan
        self.settled: dict[int, dict[str, Any]] = {}
        self.folder = folder
        self.observer = observer
        self.command = command
        self.interruptible = Interruptible()
        self.variants = [Variant(BASE, source.path)]
        self.artifacts: list[Artifact] = []
        self.evaluations: dict[str, Evaluation] = {}
        self.drafts: list[Draft] = []
        self.requantized: list[Requantized] = []

    def execute(self) -> RunOutcome:
        """Do what is left to do."""
        self._claim()
        self.journal = Journal(self.folder / "journal.jsonl")
        resumed = self.journal.find("run_started") is not None
        self.journal.append("run_started", command=self.command, resumed=resumed)
        try:
            with self.interruptible:
                return self._steps()
        except KeyboardInterrupt:
            self.journal.append("interrupted")
            raise

    def _steps(self) -> RunOutcome:
        self._evaluate(self.variants[0])
        for index, stage in enumerate(self.recipe.stages):
            if stage.beside:
                self._draft(index, stage)
            else:
                self._stage(index, stage)
        self._require_unchanged_model()
        for export in self.recipe.export:
            if export.rounds:
                self._requantize(export)
            else:
                self._export(export)
        report = self._report()
        self.journal.append("report_written", verdict=report.verdict)
        shutil.rmtree(self.folder / "scratch", ignore_errors=True)
        self.observer.event("done", verdict=report.verdict, report=self.folder / "report.html")
        return RunOutcome(self.folder, report)

    # ------------------------------------------------------------------ what goes in

    def _claim(self) -> None:
        """Write the lock of a new run; refuse one that was made of something else."""
        path = self.folder / "recipe.lock.yaml"
        lock = self._lock()
        if self.recipe.lock:
            refuse_changes(
                "the lock file was made of something else", self.recipe, self.recipe, lock
            )
        if path.exists():
            recorded = load_recipe(path, allow_outside=True)
            refuse_changes(
                f"{self.folder} holds a run of something else", recorded, self.recipe, lock
            )
            return
        atomic_write_text(self.folder / "recipe.yaml", self.recipe.text())
        atomic_write_text(path, dump_lock(self.recipe, lock, self.folder))

    def _lock(self) -> Lock:
        hashes = {file.path: file.sha256 for file in self.base_files}
        return Lock(
            model=self.source.id,
            revision=self.source.revision,
            config_sha256=hashes["config.json"],
            weights={name: sha for name, sha in hashes.items() if name.endswith(".safetensors")},
            calibration_sha256=self.calibration.sha256 if self.calibration else None,
            packages=packages(),
            effort=self.recipe.effort,
        )

    def _require_unchanged_model(self) -> None:
        """The original is read again and again during a run; it must stay what was hashed."""
        if _signature(self.source.path) != self.signature:
            raise ResumeError(
                f"{self.source.path} changed while the run was reading it",
                "start again in another folder with -o",
            )

    @cached_property
    def base_files(self) -> tuple[FileHash, ...]:
        """Every file of the original model."""
        return hash_files(self.source.path)

    @cached_property
    def calibration(self) -> CalibrationSet | None:
        """Calibration tokens, if the recipe names any."""
        if self.recipe.calibration is None:
            return None
        return build_batches(self.recipe.calibration, load_tokenizer(self.source.path))

    @cached_property
    def session(self) -> Session:
        """Where variants are measured."""
        return open_session(
            self.source.path,
            self.recipe.evaluate,
            folder=self.folder / "evaluations",
            cache=self.folder / "scratch" / "base",
            observer=self.observer,
            seen=frozenset(self.calibration.tokens) if self.calibration else None,
            files=self.base_files,
        )

    @cached_property
    def probe(self) -> Probe:
        """A short text for a look at what a step left."""
        return Probe(self.session, self.plan.whole_bytes)

    # ------------------------------------------------------------------ stages

    def _stage(self, index: int, stage: StageConfig) -> None:
        """Run, verify and evaluate one stage."""
        variant = self._finished(index, stage)
        if stage.settles_shape:
            self._settle(index, variant)
        event = self.journal.find("stage_verified", stage=variant.id) or self._verify(variant)
        surprises = [] if index else self._unread_tensors()
        surprises += [] if event["loaded_whole"] else [_NOT_LOADED_WHOLE]
        self.variants.append(variant.with_fallbacks(*surprises))
        last = max(i for i, stage in enumerate(self.recipe.stages) if not stage.beside)
        if self.recipe.evaluate.every_stage or index == last:
            self._evaluate(variant)

    def _finished(self, index: int, stage: StageConfig) -> Variant:
        """What a stage leaves, run now or by an earlier attempt."""
        name = f"{index + 1:02d}-{stage.method}"
        variant = Variant(name, self.folder / "stages" / name, stage, self.variants[-1])
        event = self.journal.find("stage_done", stage=name)
        return variant.finished(event or self._run_stage(variant))

    def _settle(self, index: int, variant: Variant) -> None:
        """Plan again with what the stage decided, so that sizes and later stages are right."""
        self.settled[index] = read_config(variant.checkpoint)
        config = read_config(self.source.path)
        self.plan = make_plan(self.recipe, config, self.plan.model, settled=self.settled)

    def _draft(self, index: int, stage: StageConfig) -> None:
        """Make a draft for the last variant, measure it, put it beside the deliverables."""
        variant = self._finished(index, stage)
        done = self.journal.find("draft_measured", stage=variant.id)
        if not done or not drafts.holds(variant, self.session):
            drafts.measure(variant, self.session)
            self.journal.append("draft_measured", stage=variant.id)
        measurement = drafts.load(variant, self.session)
        out = self.folder / "deliverable" / ("draft" if not self.drafts else variant.id)
        drafts.deliver(variant, measurement, out)
        targets = [export.name for export in self.recipe.export if export.format == "gguf"]
        file = drafts.deliver_gguf(variant, out) if targets else None
        target = f"deliverable/{targets[0]}/model.gguf" if targets else ""
        found = drafts.facts(variant, measurement, out, self.folder, gguf=file, target=target)
        self.drafts.append(found)

    def _run_stage(self, variant: Variant) -> dict[str, Any]:
        stage, parent = variant.stage, variant.parent
        assert stage is not None
        assert parent is not None
        self.observer.event("stage", stage=variant.id)
        torch.manual_seed(self.recipe.seed)
        earlier = self.journal.all("block_done", stage=variant.id)
        meter = Meter()

        def block_done(record: BlockRecord) -> None:
            facts = {"seconds": meter.lap(), "peak_bytes": meter.peak_bytes}
            self.journal.append("block_done", stage=variant.id, record=asdict(record), **facts)
            self.interruptible.check()

        context = StageContext(
            folder=variant.checkpoint,
            scratch=self.folder / "scratch" / variant.id,
            device=self.session.device,
            dtype=self.session.dtype,
            activation_budget=activation_budget(),
            finished=tuple(block_record(event["record"]) for event in earlier),
            block_done=block_done,
            observer=self.observer,
            original=self.source.path,
        )
        with meter:
            if stage.shared:
                context = self._shared(stage, parent.checkpoint, context)
            result = stage.run(parent.checkpoint, self.calibration, context)
        event = self.journal.append(
            "stage_done",
            stage=variant.id,
            result=asdict(result) | {"checkpoint": variant.id},
            seconds=meter.seconds + sum(event["seconds"] for event in earlier),
            peak_bytes=max([meter.peak_bytes, *(event["peak_bytes"] for event in earlier)]),
        )
        for fallback in result.fallbacks:
            self.observer.event("fallback", **asdict(fallback))
        shutil.rmtree(context.scratch, ignore_errors=True)
        return event

    def _shared(self, stage: StageConfig, checkpoint: Path, context: StageContext) -> StageContext:
        """Tell all processes to run a stage with this one."""
        if not self.team.alone:
            places = (context.folder, context.scratch, context.original, context.dtype)
            job = Job(stage, checkpoint, self.calibration, *places, self.recipe.seed)
            self.team.hear(job)
        return replace(context, team=self.team)

    def _verify(self, variant: Variant) -> dict[str, Any]:
        """Every promise about tensors, then a reload and a distance to the parent."""
        parent, result = variant.parent, variant.result
        assert parent is not None
        assert result is not None
        verify_tensors(
            parent.checkpoint,
            variant.checkpoint,
            result.changed,
            result.added,
            removed=result.removed,
            resized=result.resized,
            renamed=result.renamed,
        )
        before, after = map(self.probe.streamed, (parent.checkpoint, variant.checkpoint))
        return self.journal.append(
            "stage_verified",
            stage=variant.id,
            kl_to_parent=verify_divergence(before, after, variant.id),
            loaded_whole=self.probe.whole(variant.checkpoint) is not None,
        )

    def _unread_tensors(self) -> list[Fallback]:
        """What the original holds beyond its architecture; told once, and in the report."""
        architecture = Architecture.from_config(read_config(self.source.path))
        found = unread_tensors(self.source.path, architecture)
        for fallback in found:
            self.observer.event("fallback", **asdict(fallback))
        return found

    def _evaluate(self, variant: Variant) -> None:
        """Measure a variant against the base."""
        if not self._is_evaluated(variant.id):
            self.session.measure(variant.id, variant.checkpoint)
            self.journal.append("evaluated", variant=variant.id)
        self.evaluations[variant.id] = self.session.load(variant.id)

    def _is_evaluated(self, name: str) -> bool:
        done = self.journal.find("evaluated", variant=name)
        return bool(done) and self.session.holds(name)

    # ------------------------------------------------------------------ what comes out

    def _export(self, config: ExportConfig) -> None:
        """Write a deliverable from the codes, read it back, compare it with memory.

        It is written whole: what an interrupted run left of it, or somebody changed since, goes.
        """
        name = config.format
        out = self.folder / "deliverable" / name
        event = self.journal.find("exported", format=name)
        if event is None or not _is_intact(out, event["sha256"]):
            self.observer.event("export", format=name)
            shutil.rmtree(out, ignore_errors=True)
            exporter, source = exporters.exporter(name), self._export_source(config)
            exporter.write(source, out)
            sha256 = combined_sha256(hash_files(out))
            differences = self._read_back(exporter, source, out)
            event = self.journal.append("exported", format=name, sha256=sha256, **differences)
        differences = {key: event.get(key) for key in _DIFFERENCES}
        reload_ok = any(value is not None for value in differences.values())
        self._artifact(config, event["sha256"], reload_ok, **differences)

    def _requantize(self, config: ExportConfig) -> None:
        """A deliverable that another quantizer rounds: read back, and measured like a stage."""
        name, last = config.name, self.variants[-1]
        out, scratch = self.folder / "deliverable" / name, self.folder / "scratch" / "gguf"
        event = self.journal.find("exported", format=name)
        if event is None or not _is_intact(out, event["sha256"]):
            self.observer.event("export", format=name)
            shutil.rmtree(out, ignore_errors=True)
            source = self._export_source(config)
            facts = requantize.write(
                config, source, out, scratch, self._text(config), self.observer
            )
            sha256 = combined_sha256(hash_files(out))
            event = self.journal.append("exported", format=name, sha256=sha256, **facts)
        if not self._is_evaluated(name):
            dense = scratch / name
            unpack(out, last.checkpoint, dense, self.plan.parameters)
            self._evaluate(Variant(name, dense))
            shutil.rmtree(dense)
        self.evaluations[name] = self.session.load(name)
        facts = {"quantizer": event["quantizer"], "embedding": config.blocks}
        artifact = self._artifact(config, event["sha256"], True, **facts)
        self.requantized.append(Requantized(config, last.id, event, artifact))

    def _text(self, config: ExportConfig) -> requantize.Text | None:
        """For an importance matrix."""
        wanted = config.type is not None and config.imatrix
        if not wanted or self.recipe.calibration is None or self.calibration is None:
            return None
        return requantize.Text(self.recipe.calibration, self.calibration)

    def _artifact(
        self, config: ExportConfig, sha256: str, reload_ok: bool, **facts: Any
    ) -> Artifact:
        """A deliverable, as the report has it; kept in the order of the recipe."""
        out = self.folder / "deliverable" / config.name
        path = out.relative_to(self.folder).as_posix()
        facts = dict.fromkeys(_DIFFERENCES) | facts
        self.artifacts.append(
            Artifact(
                path=path,
                format=config.format,
                sha256=sha256,
                reload_ok=reload_ok,
                bytes_on_disk=sum(file.stat().st_size for file in checkpoint_files(out)),
                load_snippets=load_snippets(path, config.format),
                **facts,
            )
        )
        return self.artifacts[-1]

    def _export_source(self, config: ExportConfig) -> exporters.Source:
        checkpoint = self.variants[-1].checkpoint
        final = Architecture.from_config(read_config(checkpoint))
        scales = final.cache.scales if final.cache else ()
        return exporters.Source(
            checkpoint,
            CodesReader(*(v.checkpoint for v in self.variants if v.stage)),
            self.plan.stages[-1].parameters if self.plan.stages else self.plan.parameters,
            config.container,
            final.activations,
            dict(zip(final.cached_attention, scales, strict=False)),
            config.blocks,
        )

    def _read_back(
        self, exporter: exporters.Exporter, source: exporters.Source, out: Path
    ) -> dict[str, float | None]:
        """Compare an export with memory: by its weights where only another program loads it.

        A graph is run by its engine, and what that says is compared.
        """
        if exporter.engine is not None:
            checked = prove(
                exporter.engine, source.checkpoint, out, self.source.path, self.observer
            )
            record_event(self.journal, checked)
            return {_DIFFERENCES[2]: checked.largest}
        if exporter.read is None:
            return {_DIFFERENCES[0]: self._difference(source.checkpoint, out, out.name)}
        found = verify_weights(exporter.read(out), source.checkpoint, source.codes, out.name)
        return {_DIFFERENCES[1]: found}

    def _difference(self, checkpoint: Path, export: Path, name: str) -> float | None:
        """Between the logits of the two, loaded whole; None if memory does not hold them."""
        memory, disk = self.probe.whole(checkpoint), self.probe.whole(export)
        if memory is None or disk is None:
            return None
        return verify_export(memory, disk, name)

    def _report(self) -> Report:
        finished = Finished(
            recipe=self.recipe,
            source=self.source,
            plan=self.plan,
            folder=self.folder,
            command=self.command,
            journal=self.journal,
            base_files=self.base_files,
            variants=tuple(self.variants),
            artifacts=tuple(self.artifacts),
            evaluations=self.evaluations,
            session=self.session,
            calibration=self.calibration,
            drafts=tuple(self.drafts),
            requantized=tuple(self.requantized),
        )
        report = build_report(build_facts(finished))
        write_report(report, self.folder)
        return report


def _is_intact(folder: Path, sha256: str) -> bool:
    """Whether a deliverable is still what was verified."""
    try:
        return combined_sha256(hash_files(folder)) == sha256
    except ModelError:  # it is gone, or lacks a file
        return False


def _signature(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of change of every file of a checkpoint."""
    stats = {path.name: path.stat() for path in checkpoint_files(folder)}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
