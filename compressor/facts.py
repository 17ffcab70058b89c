"""Collect what a finished run knows into the facts its report is built from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime

from compressor.evaluation.contamination import contamination
from compressor.evaluation.gates import judge
from compressor.evaluation.results import Contamination
from compressor.evaluation.session import BASE
from compressor.formats.files import parent_files
from compressor.formats.sizes import SizeReport, measure
from compressor.journal import Journal
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import read_licence
from compressor.provenance import environment, file_sha256
from compressor.report.schema import (
    Base,
    Facts,
    Reproduce,
    Run,
)
from compressor.report.schema import Variant as Row
from compressor.serving.record import EVENT, checks_of
from compressor.state import RunState


def build_facts(done: RunState) -> Facts:
    """Everything the report states, measured or recorded; nothing is worked out later."""
    sizes = _sizes(done)
    return Facts(
        run=_run(done),
        env=environment(done.session.device),
        base=Base(
            id=done.source.id,
            revision=done.source.revision,
            licence=read_licence(done.source.path),
            family=done.plan.family,
            logical_params=done.plan.parameters,
            files=done.base_files,
        ),
        variants=tuple(_rows(done, sizes)),
        drafts=tuple(done.drafts),
        deliverables=tuple(done.artifacts),
        engine_checks=checks_of(done.journal, done.artifacts),
        evaluations=done.evaluations,
        parent_deltas={
            child: done.session.delta(parent, child)
            for child, parent in _parents(done)
            if child in done.evaluations and parent in done.evaluations
        },
        noise_floor=done.evaluations[BASE].noise_floor,
        contamination=tuple(_contamination(done)),
        gates=tuple(
            judge(
                done.recipe.gates,
                done.evaluations.get(done.judged),
                sizes[done.judged].bytes_on_disk,
            )
        ),
        judged=done.judged if done.requantized else None,
        reproduce=Reproduce(
            command=done.command,
            lock_file="recipe.lock.yaml",
            hashes={
                name: file_sha256(done.folder / name)
                for name in ("recipe.yaml", "recipe.lock.yaml")
            }
            | {artifact.path: artifact.sha256 for artifact in done.artifacts},
        ),
    )


def _rows(done: RunState, sizes: Mapping[str, SizeReport]) -> Iterator[Row]:
    """Of what stages left, and of what a second quantizer made of the last of it."""
    base, cache = sizes[BASE].bytes_on_disk, 0
    for variant in done.variants:
        cache = Architecture.from_config(read_config(variant.checkpoint)).kv_bytes_per_token
        artifact = done.own if variant is done.last else None
        yield variant.facts(sizes[variant.id], base, cache, artifact)
    for made in done.requantized:
        yield made.row(sizes[made.id], base, cache)


def _parents(done: RunState) -> Iterator[tuple[str, str]]:
    """Every variant that has a parent, and that."""
    yield from ((one.id, one.parent.id) for one in done.variants if one.parent)
    yield from ((one.id, one.parent) for one in done.requantized)


def _run(done: RunState) -> Run:
    starts = done.journal.all("run_started")
    began = float(starts[0]["time"])
    return Run(
        id=done.folder.resolve().name,
        status="finished",
        command=done.command,
        started=datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds"),
        seconds=_busy_seconds(done.journal),
        recipe=(done.folder / "recipe.yaml").read_text(encoding="utf-8"),
        recipe_sha256=file_sha256(done.folder / "recipe.yaml"),
        seed=done.recipe.seed,
        effort=done.recipe.effort,
        resumed=len(starts) - 1,
    )


def _busy_seconds(journal: Journal) -> float:
    """Wall time between the first and last event of every attempt, without the gaps between."""
    total, began, last = 0.0, 0.0, 0.0
    for event in journal.events:
        if event["event"] == EVENT:  # asked of a finished run, at any later time
            continue
        if event["event"] == "run_started":
            total += last - began
            began = event["time"]
        last = event["time"]
    return total + last - began


def _sizes(done: RunState) -> dict[str, SizeReport]:
    """Base and deliverable as measured; stages in between as they would be if exported there."""
    base = measure(done.source.path, done.plan.parameters)
    sizes = {BASE: base}
    other_files = sum(path.stat().st_size for path in parent_files(done.source.path))
    changing = [
        planned
        for planned, stage in zip(done.plan.stages, done.recipe.stages, strict=True)
        if not stage.beside
    ]
    for variant, planned in zip(done.variants[1:], changing, strict=True):
        sizes[variant.id] = SizeReport(
            bytes_on_disk=planned.packed_bytes + other_files,
            tensor_bytes=planned.packed_bytes,
            logical_parameters=done.plan.parameters,
            bits_checkpoint=planned.bits_checkpoint,
            bits_nominal=planned.bits_nominal,
            bits_linear=planned.bits_linear,
            by_role=planned.by_role,
        )
    if done.own is not None and done.last.id != BASE:
        sizes[done.last.id] = measure(done.folder / done.own.path, done.plan.parameters)
    for made in done.requantized:
        sizes[made.id] = measure(done.folder / made.artifact.path, done.plan.parameters)
    return sizes


def _contamination(done: RunState) -> list[Contamination]:
    if done.calibration is None:
        return []
    texts = (document.text for document in done.calibration.documents)
    return contamination(done.session.text, texts)
