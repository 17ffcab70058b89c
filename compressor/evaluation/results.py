"""What an evaluation yields: plain frozen values, written to JSON and read by the report.

Every estimate that has sampling error is an `Estimate`; every difference is paired by
document and carries an interval clustered by document.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

# Documents in a domain from which on intervals are a bootstrap's. It covers 94 % of normal means
# from 8 documents, but 88 % from 4 and 51 % from 2 (LOG.md); below, intervals are Student's.
FEW_DOCUMENTS = 8
INTERVALS = (
    f"a bootstrap over documents, Student's t where a domain has fewer than {FEW_DOCUMENTS} of them"
)


class Frozen(BaseModel):
    """Base of all results: immutable, and an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class Estimate(Frozen):
    """A value with its 95 % interval; `low`/`high` are None when there is one cluster only."""

    value: float
    low: float | None = None
    high: float | None = None


class Protocol(Frozen):
    """Everything that must agree before two numbers may be compared."""

    id: str  # "rolling", "gptq" or "llama.cpp"
    length: int  # window, tokens
    stride: int
    bos: str  # policy in words: "none", "prefix", "replace-first"
    suite: str
    text_sha256: str  # of the evaluated text, all domains
    tokenizer_sha256: str
    dtype: str
    backend: str  # "torch 2.13.0 cpu"
    batch: int
    documents_limit: int | None = None


class Divergence(Frozen):
    """Token-level distance KL(base || variant), nats, from exact full distributions."""

    mean: Estimate
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    maximum: float
    minimum: float
    reverse_mean: float
    top1_agreement: Estimate
    flips: int  # positions where the arg-max token differs
    delta_p_rms: float  # RMS change of the probability of the true token
    ccdf: list[tuple[float, float]]  # (KL, share of tokens above it), about 60 points


class Score(Frozen):
    """One variant on one domain (or on all)."""

    documents: int
    tokens: int  # predicted tokens
    bytes: int  # UTF-8 bytes of the text they stand for
    in_calibration: bool | None
    perplexity: Estimate
    bits_per_byte: Estimate
    delta_bits_per_byte: Estimate | None  # paired, variant minus base
    delta_perplexity_ratio: Estimate | None  # paired, variant / base
    divergence: Divergence | None


class WorstDomain(Frozen):
    """The domains that lost most; the intervals hold for the worst of all domains at once."""

    domain: str
    delta_bits_per_byte: Estimate
    kl_domain: str
    kl: Estimate


class WorstToken(Frozen):
    """A scored token at which base and variant disagree most."""

    domain: str
    document: str
    context: str  # the text before it, at most 120 characters
    token: str
    base_probability: float
    variant_probability: float
    variant_top: str
    kl: float


class Evaluation(Frozen):
    """All that was measured of one variant against the base."""

    variant: str
    protocol: Protocol
    overall: Score  # the mean over domains, each domain with equal weight
    domains: dict[str, Score]
    worst: WorstDomain | None
    worst_tokens: list[WorstToken]
    kl_by_position: list[tuple[int, float]]  # (first position of the bucket, mean KL)
    seconds: float
    peak_bytes: int
    noise_floor: Divergence | None = None  # the base against itself at another batch size


class PairedScore(Frozen):
    """Two variants on one domain (or on all), paired by document: b minus a, or b / a."""

    delta_bits_per_byte: Estimate
    delta_perplexity_ratio: Estimate
    delta_kl: Estimate | None  # difference of the mean KL from the base
    top1_agreement: Estimate
    flips: int


class Comparison(Frozen):
    """Variant `b` against variant `a`, both measured under one protocol."""

    a: str
    b: str
    protocol: Protocol
    overall: PairedScore
    domains: dict[str, PairedScore]


class Contamination(Frozen):
    """Share of evaluation n-grams that also stand in the calibration text."""

    domain: str
    ngram: int
    overlap: float
    contaminated: bool


class GateVerdict(Frozen):
    """Whether one margin of the user is kept."""

    gate: str
    limit: float
    estimate: Estimate
    verdict: str  # PASS, FAIL or INCONCLUSIVE
    sentence: str
