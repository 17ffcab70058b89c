"""What a run was asked for, what it reads, and what it has made so far.

The engine and its deliverables add to it; the report's facts are read from it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from compressor.calibration import CalibrationSet, build_batches
from compressor.evaluation.probe import Probe
from compressor.evaluation.results import Evaluation
from compressor.evaluation.session import BASE, Session
from compressor.journal import Journal
from compressor.model.load import ModelSource, load_tokenizer
from compressor.plan import Plan
from compressor.progress import Observer
from compressor.provenance import hash_files
from compressor.recipe import Recipe
from compressor.report.schema import Artifact, Draft, FileHash
from compressor.requantize import Requantized
from compressor.sessions import open_session
from compressor.variants import Variant


@dataclass
class RunState:
    """One run.

    Attributes:
        recipe: what to do.
        source: the original model.
        plan: made again when a stage has settled its shape.
        folder: directory of the run; there is one, and it is claimed, before the journal is asked.
        observer: told of progress.
        command: as typed.
        variants: the original, then what each stage left.
        artifacts: deliverables, in the order of the recipe.
        evaluations: by variant.
        drafts: as the report has them.
        requantized: deliverables that are variants of their own.
    """

    recipe: Recipe
    source: ModelSource
    plan: Plan
    folder: Path
    observer: Observer
    command: str
    variants: list[Variant] = field(default_factory=list)
    artifacts: list[Artifact] = field(default_factory=list)
    evaluations: dict[str, Evaluation] = field(default_factory=dict)
    drafts: list[Draft] = field(default_factory=list)
    requantized: list[Requantized] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.variants.append(Variant(BASE, self.source.path))

    # ------------------------------------------------------------------ read once, when asked for

    @cached_property
    def journal(self) -> Journal:
        """What is done."""
        return Journal(self.folder / "journal.jsonl")

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

    # ------------------------------------------------------------------ what is there

    @property
    def last(self) -> Variant:
        """What the last stage left."""
        return self.variants[-1]

    @property
    def own(self) -> Artifact | None:
        """The first deliverable that holds our codes, or dense weights."""
        return next((one for one in self.artifacts if one.quantizer is None), None)

    @property
    def judged(self) -> str:
        """What gates speak of: the last stage's work, unless another made the first deliverable."""
        if self.requantized and (self.last.id == BASE or self.artifacts[0] != self.own):
            return self.requantized[0].id
        return self.last.id

    # ------------------------------------------------------------------ measuring

    def is_evaluated(self, name: str) -> bool:
        """Whether the journal says that a variant is measured, and the results are there."""
        done = self.journal.find("evaluated", variant=name)
        return bool(done) and self.session.holds(name)

    def evaluate(self, variant: Variant) -> None:
        """Measure a variant against the base, unless that is done."""
        if not self.is_evaluated(variant.id):
            self.session.measure(variant.id, variant.checkpoint)
            self.journal.append("evaluated", variant=variant.id)
        self.evaluations[variant.id] = self.session.load(variant.id)
