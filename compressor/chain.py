"""The stages of a run, one after another: run, verified, measured, journaled."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from compressor import drafts
from compressor.following import Job
from compressor.interrupts import Interruptible
from compressor.journal import Event
from compressor.machine import activation_budget
from compressor.meter import Meter
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.precision import stage_dtype
from compressor.plan import make_plan
from compressor.stages.base import StageConfig
from compressor.stages.context import StageContext
from compressor.state import RunState
from compressor.team import Team
from compressor.types import BlockRecord, Fallback
from compressor.variants import Variant, block_record
from compressor.verify import unread_tensors, verify_divergence, verify_result

_NOT_LOADED_WHOLE = Fallback(
    module="model",
    reason="memory does not hold the model whole",
    action="checked block by block; AutoModelForCausalLM was not tried",
)


@dataclass(frozen=True)
class Chain:
    """Runs stages, each on what the one before left; what the journal holds is not run again.

    Attributes:
        run: gets the variants and drafts.
        team: processes that run stages that train.
        interruptible: asked after every block.
        settled: configurations that stages decided, by their place in the recipe.
    """

    run: RunState
    team: Team
    interruptible: Interruptible
    settled: dict[int, dict[str, Any]] = field(default_factory=dict)

    def add(self, index: int, stage: StageConfig) -> None:
        """Run one stage, check what it left, and tell the run of it.

        Raises:
            VerificationError: it broke a promise.
        """
        if stage.beside:
            self._draft(index, stage)
        else:
            self._stage(index, stage)

    def _stage(self, index: int, stage: StageConfig) -> None:
        """Run, verify and evaluate one stage."""
        run, variant = self.run, self._finished(index, stage)
        if stage.settles_shape:
            self._settle(index, variant)
        event = run.journal.find("stage_verified", stage=variant.id) or self._verify(variant)
        surprises = [] if index else self._unread_tensors()
        surprises += [] if event["loaded_whole"] else [_NOT_LOADED_WHOLE]
        run.variants.append(variant.with_fallbacks(*surprises))
        last = max(i for i, stage in enumerate(run.recipe.stages) if not stage.beside)
        if run.recipe.evaluate.every_stage or index == last:
            run.evaluate(variant)

    def _draft(self, index: int, stage: StageConfig) -> None:
        """Make a draft for the last variant, measure it, put it beside the deliverables."""
        run, variant = self.run, self._finished(index, stage)
        done = run.journal.find("draft_measured", stage=variant.id)
        if not done or not drafts.holds(variant, run.session):
            drafts.measure(variant, run.session)
            run.journal.append("draft_measured", stage=variant.id)
        measurement = drafts.load(variant, run.session)
        out = run.folder / "deliverable" / ("draft" if not run.drafts else variant.id)
        drafts.deliver(variant, measurement, out)
        targets = [export.name for export in run.recipe.export if export.format == "gguf"]
        file = drafts.deliver_gguf(variant, out) if targets else None
        target = f"deliverable/{targets[0]}/model.gguf" if targets else ""
        found = drafts.facts(variant, measurement, out, run.folder, gguf=file, target=target)
        run.drafts.append(found)

    def _finished(self, index: int, stage: StageConfig) -> Variant:
        """What a stage leaves, run now or by an earlier attempt."""
        name = f"{index + 1:02d}-{stage.method}"
        variant = Variant(name, self.run.folder / "stages" / name, stage, self.run.last)
        event = self.run.journal.find("stage_done", stage=name)
        if event is None:
            self.run.observer.event("stage", stage=name)
            for remark in self.run.plan.stages[index].remarks:
                self.run.observer.event("remark", stage=name, text=remark)
            event = self._run_stage(variant, stage, self.run.last.checkpoint)
        return variant.finished(event)

    def _settle(self, index: int, variant: Variant) -> None:
        """Plan again with what the stage decided, so that sizes and later stages are right."""
        run = self.run
        self.settled[index] = read_config(variant.checkpoint)
        config = read_config(run.source.path)
        run.plan = make_plan(run.recipe, config, run.plan.model, settled=self.settled)

    def _run_stage(self, variant: Variant, stage: StageConfig, parent: Path) -> Event:
        """Run a stage from where an earlier attempt of it stopped; the journal's event."""
        run, meter = self.run, Meter()
        torch.manual_seed(run.recipe.seed)
        earlier = run.journal.all("block_done", stage=variant.id)
        context = self._context(variant, parent, earlier, meter)
        with meter:
            if stage.shared:
                context = self._shared(stage, parent, context)
            result = stage.run(parent, run.calibration, context)
        event = run.journal.append(
            "stage_done",
            stage=variant.id,
            result=asdict(result) | {"checkpoint": variant.id},
            seconds=meter.seconds + sum(event["seconds"] for event in earlier),
            **{
                name: max([peak, *(event.get(name, 0) for event in earlier)])
                for name, peak in meter.peaks().items()
            },
        )
        for fallback in result.fallbacks:
            run.observer.event("fallback", **asdict(fallback))
        shutil.rmtree(context.scratch, ignore_errors=True)
        return event

    def _context(
        self, variant: Variant, parent: Path, earlier: list[Event], meter: Meter
    ) -> StageContext:
        run = self.run

        def block_done(record: BlockRecord) -> None:
            facts = {"record": asdict(record), "seconds": meter.lap(), **meter.peaks()}
            run.journal.append("block_done", stage=variant.id, **facts)
            self.interruptible.check()

        return StageContext(
            folder=variant.checkpoint,
            scratch=run.folder / "scratch" / variant.id,
            device=run.session.device,
            dtype=stage_dtype(parent, run.session.device),
            activation_budget=activation_budget(),
            finished=tuple(block_record(event["record"]) for event in earlier),
            block_done=block_done,
            observer=run.observer,
            original=run.source.path,
        )

    def _shared(self, stage: StageConfig, checkpoint: Path, context: StageContext) -> StageContext:
        """Tell all processes to run a stage with this one."""
        if not self.team.alone:
            places = (context.folder, context.scratch, context.original, context.dtype)
            run = self.run
            self.team.hear(Job(stage, checkpoint, run.calibration, *places, run.recipe.seed))
        return replace(context, team=self.team)

    def _verify(self, variant: Variant) -> Event:
        """Every promise about tensors, then a reload and a distance to the parent."""
        run, parent, result = self.run, variant.parent, variant.result
        assert parent is not None
        assert result is not None
        verify_result(parent.checkpoint, result)
        before, after = map(run.probe.streamed, (parent.checkpoint, variant.checkpoint))
        return run.journal.append(
            "stage_verified",
            stage=variant.id,
            kl_to_parent=verify_divergence(before, after, variant.id),
            loaded_whole=run.probe.whole(variant.checkpoint) is not None,
        )

    def _unread_tensors(self) -> list[Fallback]:
        """What the original holds beyond its architecture; told once, and in the report."""
        path = self.run.source.path
        found = unread_tensors(path, Architecture.from_config(read_config(path)))
        for fallback in found:
            self.run.observer.event("fallback", **asdict(fallback))
        return found
