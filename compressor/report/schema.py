"""The shape of `report.json`, the only source of the HTML page, the model card and the figures.

`Facts` is what a run knows; `Report` adds what follows from it (see `build.py`). Sizes are
bytes, times seconds, losses and divergences as named in `compressor.evaluation.results`.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from compressor.decoding.results import DraftMeasurement, LearningCurve, Outlook
from compressor.evaluation.results import (
    Contamination,
    Divergence,
    Estimate,
    Evaluation,
    Frozen,
    GateVerdict,
)

SCHEMA_VERSION = "1.9.0"
SCHEMA_ID = f"urn:compressor:report:{SCHEMA_VERSION}"

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "NO GATES"]
Style = Literal[
    "text",
    "key",
    "length",
    "bytes",
    "ratio",
    "count",
    "bits",
    "share",
    "seconds",
    "number",
    "estimate",
    "delta",
]


class Run(Frozen):
    """The run that wrote the report."""

    id: str
    status: Literal["finished", "failed", "interrupted"]
    command: str
    started: str = Field(description="ISO 8601, UTC")
    seconds: float
    recipe: str = Field(description="the recipe as it was read, verbatim")
    recipe_sha256: str
    seed: int
    effort: str = Field(default="default", description="at which the recipe was read")
    resumed: int = Field(description="how many times the run was taken up again")


class Hardware(Frozen):
    """The machine that computed every number."""

    cpu: str
    cores: int
    memory_bytes: int
    accelerator: str | None = None


class Environment(Frozen):
    """The software that computed every number."""

    package: str = Field(description="version of this package")
    commit: str | None = None
    python: str
    torch: str
    transformers: str
    compressed_tensors: str
    device: str
    hardware: Hardware
    deterministic: bool


class FileHash(Frozen):
    """One file of a checkpoint."""

    path: str
    sha256: str
    bytes: int


class Base(Frozen):
    """The model the run started from; `logical_params` counts tied weights once."""

    id: str
    revision: str | None
    licence: str | None
    family: str
    logical_params: int
    files: tuple[FileHash, ...]


class LayerMetric(Frozen):
    """`compressor.types.ModuleMetric` as it is written to JSON."""

    module: str
    bits: float
    loss: float
    baseline_loss: float


class StageFallback(Frozen):
    """`compressor.types.Fallback` as it is written to JSON."""

    module: str
    reason: str
    action: str


class MixturePoint(Frozen):
    """`compressor.types.MixturePoint` as it is written to JSON."""

    at: int
    shares: dict[str, float]
    losses: dict[str, float]


class Mixture(Frozen):
    """Shares of the domains over time, of a stage that weighs them."""

    unit: str = Field(description="what `at` counts: update, block or round")
    points: tuple[MixturePoint, ...]


_SIMPLE_METHODS = {
    "prune": "deletion that nothing makes up for",
    "transform": "the same rounding without the transform",
}


class StageFacts(Frozen):
    """What was done to get a variant from its parent."""

    method: str
    params: dict[str, Any]
    seconds: float
    peak_bytes: int = Field(description="most resident memory of the process")
    device_peak_bytes: int = Field(0, description="most memory of tensors on the GPU; 0 without")
    metrics_per_module: tuple[LayerMetric, ...] = ()
    fallbacks: tuple[StageFallback, ...] = ()
    notes: dict[str, float] = Field(default_factory=dict)
    mixture: Mixture | None = None

    @property
    def simple_method(self) -> str:
        """What `baseline_loss` of its matrices belongs to, in words."""
        return _SIMPLE_METHODS.get(self.method.partition(".")[0], "round to nearest")


class RoleBytes(Frozen):
    """Tensor bytes by what they hold; ties counted once. Dense matrices belong to `rest`."""

    codes: int = 0
    scales: int = 0
    zero_points: int = 0
    embeddings: int = 0
    head: int = 0
    rest: int = 0


class Size(Frozen):
    """What a variant takes on disk.

    `bits_nominal` is the width of a code, `bits_linear` adds scales and zero-points,
    `bits_checkpoint` is 8 · tensor bytes / logical parameters of the base: the headline.
    """

    bytes_on_disk: int
    tensor_bytes: int
    by_role: RoleBytes
    bits_nominal: float
    bits_linear: float
    bits_checkpoint: float
    ratio_total: float = Field(description="bytes on disk of the base / of this variant")
    kv_bytes_per_token: int


class Artifact(Frozen):
    """The deliverable of a variant, after it was read back from disk.

    What memory does not hold whole is not read back: `reload_ok` is false and no difference known.
    """

    path: str
    format: str
    sha256: str
    reload_ok: bool
    max_logit_difference: float | None
    max_weight_difference: float | None = Field(
        default=None,
        description="for formats that Transformers does not load: of the dense weights that the "
        "file holds to those in memory, relative to the largest weight of the matrix",
    )
    max_logprob_difference: float | None = Field(
        default=None,
        description="for formats that one engine alone loads: the largest difference of a token's "
        "log-probability between that engine and memory, nats",
    )
    bytes_on_disk: int | None = None
    quantizer: str | None = Field(
        default=None,
        description="the program that rounded weights itself, where that was not us; the file then "
        "holds none of our codes, unless `embedding` says otherwise, and is a variant of its own",
    )
    embedding: str | None = Field(
        default=None,
        description="type of block that the quantizer rounded an embedding and a head to that the "
        "chain left dense; all else in the file are our codes",
    )
    load_snippets: dict[str, str] = Field(
        default_factory=dict, description="engine or library -> code that loads it"
    )
    refusals: dict[str, str] = Field(
        default_factory=dict,
        description="engines that read the format and would not load this -> why",
    )


class Variant(Frozen):
    """One checkpoint: a row of the report. The first one is the base and has no stage."""

    id: str
    label: str
    parent: str | None
    stage: StageFacts | None
    size: Size
    artifact: Artifact | None = None
    load_snippets: dict[str, str] = Field(
        default_factory=dict, description="engine or library -> code that loads the artifact"
    )


class Draft(Frozen):
    """A model that speculates for a variant: it stands beside it and replaces nothing."""

    id: str
    label: str
    target: str = Field(description="the variant that it speculates for")
    stage: StageFacts
    path: str
    gguf: str | None = Field(
        default=None, description="the same draft as a file for llama.cpp, beside a GGUF export"
    )
    bytes_on_disk: int
    target_sha256: str = Field(description="of the target's weights as they compute")
    trained_tokens: int
    measurement: DraftMeasurement
    worthwhile: bool = Field(description="whether it was measurably faster than plain decoding")
    outlook: Outlook | None = Field(default=None, description="of a draft that does not pay")
    curve: LearningCurve | None = Field(default=None, description="τ against training tokens")
    load_snippets: dict[str, str] = Field(
        default_factory=dict, description="engine -> code that decodes with target and draft"
    )


class EngineCheck(Frozen):
    """What an engine said about a deliverable when it was asked (`compress serve-check`).

    Log-probabilities are natural; without a version the engine did not answer.
    """

    engine: str = Field(description="as `--engine` takes it")
    title: str
    version: str = ""
    format: str
    sha256: str = Field(description="of the deliverable")
    verdict: Literal["PASS", "FAIL"]
    detail: str = Field(description="why, in one sentence")
    arithmetic: str = Field(
        default="", description="dtype it computes in; int8: inputs of matrices in 8 bits"
    )
    tokens: int = Field(default=0, description="of text that it scored")
    difference: float | None = Field(
        default=None, description="mean |Δ log p| to what was measured, nats"
    )
    largest: float | None = Field(default=None, description="largest |Δ log p|, nats")
    bias: float | None = Field(default=None, description="mean Δ log p, nats")
    allowed: float | None = Field(
        default=None, description="of `difference`: a multiple of what its arithmetic alone causes"
    )
    to_original: float | None = Field(
        default=None,
        description="mean |Δ log p| between the engine and the original model: what it would be "
        "if the engine computed that instead",
    )
    prompts: int = 0
    same_text: int = Field(default=0, description="prompts continued greedily as here")
    gap: float | None = Field(
        default=None, description="most by which a token it wrote is less likely than the best"
    )
    gap_allowed: float | None = None
    load_seconds: float | None = None
    tokens_per_second: float | None = Field(default=None, description="written, one text at a time")


class Reproduce(Frozen):
    """What gives the same bytes again."""

    command: str
    lock_file: str
    hashes: dict[str, str] = Field(description="file -> sha256")


class Facts(Frozen):
    """Everything the engine hands over. Evaluations are keyed by variant id.

    `parent_deltas` holds, where it was measured, the paired difference in bits per byte to the
    parent; without it the report gives the difference of the means and no interval.
    """

    schema_version: str = Field(default=SCHEMA_VERSION, pattern=r"^1\.\d+\.\d+$")
    run: Run
    env: Environment
    base: Base
    variants: tuple[Variant, ...] = Field(min_length=1)
    evaluations: dict[str, Evaluation]
    parent_deltas: dict[str, Estimate] = Field(default_factory=dict)
    noise_floor: Divergence | None = None
    contamination: tuple[Contamination, ...] = ()
    gates: tuple[GateVerdict, ...] = ()
    drafts: tuple[Draft, ...] = ()
    deliverables: tuple[Artifact, ...] = Field(
        default=(),
        description="all exports; the first one of our codes is the artifact of the last stage",
    )
    engine_checks: tuple[EngineCheck, ...] = Field(
        default=(), description="what engines said about the deliverables"
    )
    judged: str | None = Field(
        default=None,
        description="variant the gates speak of; the last one that was compared when null",
    )
    reproduce: Reproduce

    @model_validator(mode="after")
    def _numbers_are_finite(self) -> Self:
        try:
            json.dumps(self.model_dump(), allow_nan=False)
        except ValueError as error:
            raise ValueError("a report holds finite numbers only, found NaN or infinity") from error
        return self

    @model_validator(mode="after")
    def _references_resolve(self) -> Self:
        ids = [variant.id for variant in self.variants]
        if len(set(ids)) != len(ids):
            raise ValueError(f"variant ids must be unique, got {ids}")
        if self.variants[0].stage is not None or self.variants[0].parent is not None:
            raise ValueError("the first variant must be the base: no stage and no parent")
        for place, variant in enumerate(self.variants[1:], start=1):
            if variant.stage is None or variant.parent not in ids[:place]:
                raise ValueError(f"variant {variant.id!r} needs a stage and an earlier parent")
        strangers = sorted({draft.target for draft in self.drafts} - set(ids))
        if strangers:
            raise ValueError(f"drafts of unknown variants: {strangers}")
        named = {*self.evaluations, *self.parent_deltas, *([self.judged] if self.judged else [])}
        unknown = sorted(named - set(ids))
        if unknown:
            raise ValueError(f"measurements of unknown variants: {unknown}")
        return self


class Evidence(Frozen):
    """A part of a sentence and the place in the report that it was printed from."""

    pointer: str = Field(description="JSON pointer (RFC 6901) into the report")
    style: Style
    shown: str


class Statement(Frozen):
    """A sentence for people; every digit in it is covered by its evidence."""

    id: str
    text: str
    evidence: tuple[Evidence, ...]


class Attribution(Frozen):
    """What one stage cost and saved, by itself.

    Attributes:
        delta_to_base: bits per byte, paired, variant minus base.
        delta_to_parent: bits per byte, variant minus parent.
        paired: whether `delta_to_parent` was measured document by document.
        bytes_saved: bytes on disk of the parent minus those of the variant.
        median_loss: median over matrices of the relative layer error.
        median_baseline_loss: the same for the simple method (`StageFacts.simple_method`).
    """

    variant: str
    parent: str
    delta_to_base: Estimate | None
    delta_to_parent: Estimate | None
    paired: bool
    bytes_saved: int
    median_loss: float | None
    median_baseline_loss: float | None


class RunFallback(StageFallback):
    """A fallback and the variant it belongs to."""

    variant: str


class Report(Facts):
    """`report.json`: the facts and everything that follows from them."""

    headline: str = Field(description="variant the summary and the gates speak of")
    verdict: Verdict
    pareto: tuple[str, ...] = Field(description="variants that no other one dominates")
    attribution: tuple[Attribution, ...]
    claims: tuple[Statement, ...]
    warnings: tuple[Statement, ...]
    fallbacks: tuple[RunFallback, ...]


def json_schema() -> dict[str, Any]:
    """JSON Schema (draft 2020-12) of `report.json`."""
    schema = Report.model_json_schema(mode="serialization")
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": SCHEMA_ID}
    return {**head, **schema}
