"""Tables of the report as plain cells; the page, the card and the terminal print the same ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compressor.evaluation.results import INTERVALS, Divergence, Estimate, Evaluation, Score
from compressor.report import numbers
from compressor.report.figures.base import compared, domains_of, labels_of, remarks_of
from compressor.report.schema import Attribution, Report, StageFacts, Variant

NONE = "–"


@dataclass(frozen=True)
class Table:
    """Cells with their heading.

    Attributes:
        key: its anchor.
        caption: what the numbers are, with units and conventions.
        header: one heading for each column.
        rows: one cell for each column; the first one names the row.
        words: columns that hold words and are set flush left; the first one always is.
    """

    key: str
    caption: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    words: frozenset[int] = frozenset({0})

    def without(self, *headings: str) -> Table:
        """The same table with some columns left out."""
        kept = [i for i, heading in enumerate(self.header) if heading not in headings]
        words = frozenset(place for place, i in enumerate(kept) if i in self.words)
        rows = tuple(tuple(row[i] for i in kept) for row in self.rows)
        return Table(self.key, self.caption, tuple(self.header[i] for i in kept), rows, words)


def or_none(value: Any, show: Callable[[Any], str]) -> str:
    """A value as `show` prints it, or the sign for none."""
    return NONE if value is None else show(value)


def signed(estimate: Estimate | None) -> str:
    """A difference ± half its interval."""
    return or_none(estimate, lambda e: numbers.plus_minus(e, signed=True))


def size_table(report: Report) -> Table:
    """Bytes and bits of every variant."""
    return Table(
        "sizes",
        "Size. On disk: every file needed to load; 1 MB = 10⁶ bytes. Bits per weight of the "
        "checkpoint: 8 × tensor bytes / parameters of the base, ties counted once. Of the "
        "matrices: codes with scales and zero-points. KV: cache per token of context.",
        (
            "variant",
            "method",
            "on disk",
            "ratio",
            "bits / weight, checkpoint",
            "matrices",
            "codes",
            "KV / token",
        ),
        tuple(_size_row(variant) for variant in report.variants),
        frozenset({0, 1}),
    )


def _size_row(variant: Variant) -> tuple[str, ...]:
    size = variant.size
    return (
        variant.label,
        variant.stage.method if variant.stage else NONE,
        numbers.size(size.bytes_on_disk),
        numbers.ratio(size.ratio_total),
        numbers.bits(size.bits_checkpoint),
        numbers.bits(size.bits_linear),
        f"{size.bits_nominal:g}",
        numbers.size(size.kv_bytes_per_token),
    )


def quality_table(report: Report) -> Table:
    """Accuracy of every variant, cumulative and by its own stage."""
    own = {item.variant: item for item in report.attribution}
    rows = (
        _quality_row(v, report.evaluations[v.id], own.get(v.id))
        for v in report.variants
        if v.id in report.evaluations
    )
    return Table(
        "quality",
        "Accuracy, mean over domains. ± is half the 95 % interval. Δ base: paired difference to "
        "the base, all stages together. Δ parent: the last stage alone; ≈ marks a difference of "
        "means that was not paired by document and has no interval. The ± of the worst domain "
        "holds for the worst of all domains at once, that in the domain's own row for it alone.",
        (
            "variant",
            "bits / byte",
            "Δ base",
            "Δ parent",
            "mean KL, nats",
            "worst domain's KL",
            "99.9 % KL",
            "same top",
        ),
        tuple(rows),
        frozenset({0, 5}),
    )


def _quality_row(
    variant: Variant, evaluation: Evaluation, own: Attribution | None
) -> tuple[str, ...]:
    score, worst = evaluation.overall, evaluation.worst
    mean_kl, *tails = _divergence_cells(score.divergence)
    return (
        variant.label,
        numbers.plus_minus(score.bits_per_byte),
        signed(score.delta_bits_per_byte),
        own_delta(own),
        mean_kl,
        f"{worst.kl_domain} {numbers.plus_minus(worst.kl)}" if worst else NONE,
        *tails,
    )


def own_delta(own: Attribution | None) -> str:
    """What the stage alone cost in bits per byte."""
    if own is None or own.delta_to_parent is None:
        return NONE
    return signed(own.delta_to_parent) if own.paired else f"≈ {signed(own.delta_to_parent)}"


def _divergence_cells(divergence: Divergence | None) -> tuple[str, str, str]:
    if divergence is None:
        return NONE, NONE, NONE
    return (
        numbers.plus_minus(divergence.mean),
        numbers.number(divergence.p999),
        agreement(divergence),
    )


def agreement(divergence: Divergence) -> str:
    """Share of positions at which the most likely token is the base's, in percent."""
    found = divergence.top1_agreement
    low, high = (None if end is None else 100 * end for end in (found.low, found.high))
    shown = Estimate(value=100 * found.value, low=low, high=high)
    return f"{numbers.plus_minus(shown)}\u00a0%"


def domain_table(report: Report, variant: str) -> Table:
    """One variant, domain by domain."""
    evaluation = report.evaluations[variant]
    return Table(
        f"domains-{variant}",
        f"{labels_of(report)[variant]} by domain. ± is half the 95 % interval ({INTERVALS}); "
        "differences are paired by document.",
        (
            "domain",
            "docs",
            "tokens",
            "bits / byte",
            "Δ base",
            "perplexity",
            "ratio to base",
            "mean KL, nats",
            "99.9 % KL",
            "same top",
        ),
        (
            *(
                _domain_row(_with_remarks(report, name), evaluation.domains[name])
                for name in domains_of(report)
                if name in evaluation.domains
            ),
            _domain_row("mean over domains", evaluation.overall),
        ),
    )


def _with_remarks(report: Report, domain: str) -> str:
    remarks = remarks_of(report, domain)
    return f"{domain} ({remarks})" if remarks else domain


def _domain_row(domain: str, score: Score) -> tuple[str, ...]:
    return (
        domain,
        numbers.count(score.documents),
        numbers.count(score.tokens),
        numbers.plus_minus(score.bits_per_byte),
        signed(score.delta_bits_per_byte),
        numbers.plus_minus(score.perplexity),
        or_none(score.delta_perplexity_ratio, numbers.plus_minus),
        *_divergence_cells(score.divergence),
    )


_DIVERGENCE_ROWS: dict[str, Callable[[Divergence], str]] = {
    "Mean KLD": lambda d: numbers.plus_minus(d.mean),
    "Maximum KLD": lambda d: numbers.number(d.maximum),
    "99.9% KLD": lambda d: numbers.number(d.p999),
    "99.0% KLD": lambda d: numbers.number(d.p99),
    "95.0% KLD": lambda d: numbers.number(d.p95),
    "90.0% KLD": lambda d: numbers.number(d.p90),
    "Median KLD": lambda d: numbers.number(d.median),
    "Minimum KLD": lambda d: numbers.number(d.minimum),
    "Mean reverse KLD": lambda d: numbers.number(d.reverse_mean),
    "RMS Δp": lambda d: numbers.share(d.delta_p_rms),
    "Same top p": agreement,
    "Changed top tokens": lambda d: numbers.count(d.flips),
}


def divergence_table(report: Report) -> Table | None:
    """Token-level divergence under the row names that llama.cpp prints."""
    columns = {
        labels_of(report)[name]: divergence
        for name in compared(report)
        if (divergence := report.evaluations[name].overall.divergence) is not None
    }
    if not columns:
        return None
    if report.noise_floor is not None:
        columns["noise floor"] = report.noise_floor
    return Table(
        "divergence",
        "KL(base ‖ variant) over all evaluated tokens, nats, from full distributions; rows are "
        "named as llama.cpp names them. Δp: change of the probability of the true token.",
        ("statistic", *columns),
        tuple((n, *(show(d) for d in columns.values())) for n, show in _DIVERGENCE_ROWS.items()),
    )


def stage_table(report: Report) -> Table | None:
    """What every stage did, cost and saved by itself."""
    by_id = {variant.id: variant for variant in report.variants}
    rows = [_stage_row(by_id[item.variant], item, labels_of(report)) for item in report.attribution]
    if not rows:
        return None
    return Table(
        "stages",
        "Every stage by itself, against its parent. Layer error: median over matrices of the "
        "relative error tr(D H Dᵀ) / tr(W H Wᵀ), beside that of the simple method: round to "
        "nearest, or deletion that nothing makes up for.",
        (
            "stage",
            "bytes",
            "Δ bits / byte",
            "layer error",
            "nearest",
            "time",
            "peak memory",
            "fallbacks",
        ),
        tuple(rows),
    )


def _stage_row(variant: Variant, own: Attribution, labels: dict[str, str]) -> tuple[str, ...]:
    stage = variant.stage
    if stage is None:
        return ()
    return (
        f"{stage.method} after {labels[own.parent]}",
        numbers.size_change(-own.bytes_saved),
        own_delta(own),
        or_none(own.median_loss, numbers.number),
        or_none(own.median_baseline_loss, numbers.number),
        numbers.duration(stage.seconds),
        _peaks(stage),
        str(len(stage.fallbacks)),
    )


def _peaks(stage: StageFacts) -> str:
    """Memory of the process, and of the GPU where there is one."""
    resident, device = numbers.size(stage.peak_bytes), numbers.size(stage.device_peak_bytes)
    return f"{resident}, GPU {device}" if stage.device_peak_bytes else resident


def settings(params: dict[str, Any]) -> str:
    """Options of a stage in one line; what is empty or off is left out."""
    kept = (
        _option(name, value)
        for name, value in params.items()
        if value is not None and value is not False and value not in ("", [], ())
    )
    return ", ".join(kept) or NONE


def _option(name: str, value: Any) -> str:
    if value is True:
        return name
    shown = "+".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
    return f"{name} {shown}"


def notes_table(report: Report) -> Table | None:
    """Facts that stages reported by name."""
    rows = [
        (v.stage.method, name.replace("_", " "), numbers.plain(value))
        for v in report.variants
        if v.stage is not None
        for name, value in v.stage.notes.items()
    ]
    header = ("stage", "fact", "value")
    caption = "What the stages noted."
    return Table("notes", caption, header, tuple(rows), frozenset({0, 1})) if rows else None


def worst_token_table(report: Report) -> Table | None:
    """The tokens on which the headline variant left the base furthest."""
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None or not evaluation.worst_tokens:
        return None
    rows = (
        (
            item.domain,
            item.document,
            f"…{visible(item.context)}",
            visible(item.token),
            numbers.number(item.base_probability, 2),
            numbers.number(item.variant_probability, 2),
            visible(item.variant_top),
            numbers.number(item.kl),
        )
        for item in evaluation.worst_tokens
    )
    return Table(
        "worst-tokens",
        "The evaluated tokens with the largest divergence. ␣ is a space, ⏎ a new line.",
        (
            "domain",
            "document",
            "text before",
            "true token",
            "p, base",
            "p, variant",
            "variant says",
            "KL, nats",
        ),
        tuple(rows),
        frozenset({0, 1, 2, 3, 6}),
    )


def visible(text: str) -> str:
    """Text with its white space and control characters made visible."""
    swapped = text.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    lead = len(swapped) - len(swapped.lstrip(" "))
    swapped = "␣" * lead + swapped[lead:]
    return "".join(c if c.isprintable() else "�" for c in swapped)


def fallback_table(report: Report) -> Table | None:
    """Everything that was done otherwise than asked."""
    labels = labels_of(report) | {draft.id: draft.label for draft in report.drafts}
    rows = [(labels[f.variant], f.module, f.reason, f.action) for f in report.fallbacks]
    return (
        Table(
            "fallbacks",
            "Everything that was done otherwise than asked.",
            ("variant", "module", "because", "instead"),
            tuple(rows),
            frozenset({0, 1, 2, 3}),
        )
        if rows
        else None
    )


def contamination_table(report: Report) -> Table | None:
    """Overlap of evaluation and calibration text."""
    rows = [
        (c.domain, str(c.ngram), f"{100 * c.overlap:.2f} %", "yes" if c.contaminated else "no")
        for c in report.contamination
    ]
    return (
        Table(
            "contamination",
            "Share of the evaluation text's n-grams that also stand in the calibration text; "
            "n counts words, in code characters.",
            ("domain", "n", "overlap", "contaminated"),
            tuple(rows),
            frozenset({0, 3}),
        )
        if rows
        else None
    )


def protocol_of(report: Report) -> tuple[tuple[str, str], ...]:
    """The protocol behind the headline's numbers, by name."""
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None:
        return ()
    protocol = evaluation.protocol
    return (
        ("protocol", protocol.id),
        ("suite", protocol.suite),
        ("window / stride", f"{protocol.length} / {protocol.stride} tokens"),
        ("beginning of sequence", protocol.bos),
        ("predicted tokens", numbers.count(evaluation.overall.tokens)),
        ("documents", numbers.count(evaluation.overall.documents)),
        ("limit", or_none(protocol.documents_limit, lambda n: f"{n} documents per domain")),
        ("dtype", protocol.dtype),
        ("backend", protocol.backend),
        ("batch", str(protocol.batch)),
        ("text sha256", protocol.text_sha256),
        ("tokenizer sha256", protocol.tokenizer_sha256),
    )
