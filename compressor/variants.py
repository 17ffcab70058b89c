"""The checkpoints of a run, from the original to the last, and their place in the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compressor.formats.sizes import SizeReport
from compressor.report.schema import (
    Artifact,
    LayerMetric,
    Mixture,
    RoleBytes,
    Size,
    StageFacts,
    StageFallback,
)
from compressor.report.schema import MixturePoint as ReportedPoint
from compressor.report.schema import Variant as ReportVariant
from compressor.stages.base import StageConfig
from compressor.types import BlockRecord, Fallback, MixturePoint, ModuleMetric, StageResult


@dataclass(frozen=True)
class Variant:
    """A checkpoint with what made it.

    Attributes:
        id: `base` or `NN-method`.
        checkpoint: its directory.
        stage: options of the stage; None for the base.
        parent: the variant before; None for the base.
        result: what the stage left, once it is done.
        seconds, peak_bytes, device_peak_bytes: cost of the stage, over all attempts.
    """

    id: str
    checkpoint: Path
    stage: StageConfig | None = None
    parent: Variant | None = None
    result: StageResult | None = None
    seconds: float = 0.0
    peak_bytes: int = 0
    device_peak_bytes: int = 0

    def finished(self, event: Mapping[str, Any]) -> Variant:
        """With the result that the journal's `stage_done` event holds."""
        facts = event["result"]
        result = StageResult(
            checkpoint=self.checkpoint,
            changed=tuple(facts["changed"]),
            metrics=tuple(ModuleMetric(**metric) for metric in facts["metrics"]),
            fallbacks=tuple(Fallback(**fallback) for fallback in facts["fallbacks"]),
            notes=facts["notes"],
            added=tuple(facts["added"]),
            removed=tuple(facts.get("removed", ())),
            resized=tuple(facts.get("resized", ())),
            renamed=facts.get("renamed", {}),
            mixture=tuple(MixturePoint(**point) for point in facts.get("mixture", ())),
            mixture_unit=facts.get("mixture_unit", "update"),
        )
        return replace(
            self,
            result=result,
            seconds=event["seconds"],
            peak_bytes=event["peak_bytes"],
            device_peak_bytes=event.get("device_peak_bytes", 0),  # older runs have none
        )

    def with_fallbacks(self, *more: Fallback) -> Variant:
        """With more things done otherwise than asked."""
        assert self.result is not None
        fallbacks = (*self.result.fallbacks, *more)
        return replace(self, result=replace(self.result, fallbacks=fallbacks))

    def facts(
        self,
        size: SizeReport,
        base_bytes: int,
        kv_bytes_per_token: int,
        artifact: Artifact | None,
    ) -> ReportVariant:
        """The variant's row of the report."""
        return ReportVariant(
            id=self.id,
            label=self._label(),
            parent=self.parent.id if self.parent else None,
            stage=self.stage_facts(),
            size=size_of(size, base_bytes, kv_bytes_per_token),
            artifact=artifact,
            load_snippets=artifact.load_snippets if artifact else {},
        )

    def _label(self) -> str:
        """Of the stage; a rounder whose grids were allocated has no width of its own."""
        if self.stage is None:
            return self.id
        before = self.parent.stage if self.parent else None
        if before is not None and hasattr(before, "choices"):
            method = self.stage.method.rpartition(".")[2].upper()
            return f"{method}, {before.label}"
        return self.stage.label

    def stage_facts(self) -> StageFacts | None:
        """What the stage did; None for the base."""
        if self.stage is None or self.result is None:
            return None
        return StageFacts(
            method=self.stage.method,
            params=self.stage.model_dump(mode="json", exclude={"method"}),
            seconds=self.seconds,
            peak_bytes=self.peak_bytes,
            device_peak_bytes=self.device_peak_bytes,
            metrics_per_module=tuple(LayerMetric(**asdict(m)) for m in self.result.metrics),
            fallbacks=tuple(StageFallback(**asdict(f)) for f in self.result.fallbacks),
            notes=self.result.notes,
            mixture=_mixture(self.result),
        )


def _mixture(result: StageResult) -> Mixture | None:
    if not result.mixture:
        return None
    points = tuple(ReportedPoint(**asdict(point)) for point in result.mixture)
    return Mixture(unit=result.mixture_unit, points=points)


def size_of(size: SizeReport, base_bytes: int, kv_bytes_per_token: int) -> Size:
    """What a checkpoint takes on disk, as the report has it."""
    return Size(
        **size.model_dump(exclude={"by_role", "logical_parameters"}),
        by_role=RoleBytes(**size.by_role),
        ratio_total=base_bytes / size.bytes_on_disk,
        kv_bytes_per_token=kv_bytes_per_token,
    )


def block_record(facts: Mapping[str, Any]) -> BlockRecord:
    """A journaled `BlockRecord`."""
    return BlockRecord(
        block=facts["block"],
        metrics=tuple(ModuleMetric(**metric) for metric in facts["metrics"]),
        fallbacks=tuple(Fallback(**fallback) for fallback in facts["fallbacks"]),
        notes=facts.get("notes", {}),
    )
