"""From the facts of a run to its report: what follows is computed here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from statistics import median

from compressor.errors import VerificationError
from compressor.evaluation.results import Estimate, Score
from compressor.report import statements
from compressor.report.draft_statements import draft_claims, draft_warnings
from compressor.report.schema import (
    Attribution,
    Facts,
    Report,
    RunFallback,
    Statement,
    Style,
    Variant,
    Verdict,
)
from compressor.report.statements import Document, pointer, state

FEW_TOKENS = 10_000  # fewer, and the 99.9 % quantile rests on less than ten of them


def build_report(facts: Facts) -> Report:
    """The report: verdict, Pareto set, cost by stage, sentences with evidence, warnings.

    Args:
        facts: what the run knows.
    """
    headline = headline_of(facts)
    draft = Report(
        **{name: getattr(facts, name) for name in Facts.model_fields},
        headline=headline,
        verdict=verdict_of(facts),
        pareto=pareto_of(facts),
        attribution=tuple(_attribution(facts)),
        claims=(),
        warnings=(),
        fallbacks=tuple(_fallbacks(facts)),
    )
    document = draft.model_dump(mode="json")
    claims, warnings = tuple(_claims(draft, document)), tuple(_warnings(draft, document))
    return draft.model_copy(update={"claims": claims, "warnings": warnings})


def check_evidence(report: Report) -> None:
    """Refuse a report with a sentence that its numbers do not support.

    Raises:
        VerificationError: names the first such sentence.
    """
    document = report.model_dump(mode="json")
    found = statements.problems(document, (*report.claims, *report.warnings))
    if found:
        raise VerificationError(f"report.json contradicts itself: {found[0]}")


def check_report(report: Report) -> None:
    """Refuse a report whose sentences or derived values differ from its facts.

    Raises:
        VerificationError: names the first difference.
    """
    check_evidence(report)
    facts = Facts(**{name: getattr(report, name) for name in Facts.model_fields})
    rebuilt = build_report(facts)
    for name in sorted(set(Report.model_fields) - set(Facts.model_fields)):
        if getattr(rebuilt, name) != getattr(report, name):
            raise VerificationError(f"report.json: {name!r} does not follow from the facts")


def headline_of(facts: Facts) -> str:
    """The judged variant, or else the last one compared with the base, or else the base."""
    if facts.judged is not None:
        return facts.judged
    compared = [v.id for v in facts.variants[1:] if v.id in facts.evaluations]
    return compared[-1] if compared else facts.variants[0].id


def verdict_of(facts: Facts) -> Verdict:
    """One failed gate fails the run; one undecided gate leaves it undecided."""
    verdicts = {gate.verdict for gate in facts.gates}
    if not verdicts:
        return "NO GATES"
    if "FAIL" in verdicts:
        return "FAIL"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in verdicts else "PASS"


def pareto_of(facts: Facts) -> tuple[str, ...]:
    """Evaluated variants to which no other is at least equal in both bytes and bits per byte."""
    points = {
        v.id: (v.size.bytes_on_disk, facts.evaluations[v.id].overall.bits_per_byte.value)
        for v in facts.variants
        if v.id in facts.evaluations
    }

    def dominated(point: tuple[int, float]) -> bool:
        return any(
            other[0] <= point[0] and other[1] <= point[1] and other != point
            for other in points.values()
        )

    return tuple(name for name, point in points.items() if not dominated(point))


def _fallbacks(facts: Facts) -> Iterator[RunFallback]:
    for variant in facts.variants[1:]:
        for item in variant.stage.fallbacks if variant.stage else ():
            yield RunFallback(variant=variant.id, **item.model_dump())
    for draft in facts.drafts:
        for item in draft.stage.fallbacks:
            yield RunFallback(variant=draft.id, **item.model_dump())


def _attribution(facts: Facts) -> Iterator[Attribution]:
    by_id = {variant.id: variant for variant in facts.variants}
    for variant in facts.variants[1:]:
        if variant.stage is None or variant.parent is None:
            continue
        metrics = variant.stage.metrics_per_module
        evaluation = facts.evaluations.get(variant.id)
        own, paired = _delta_to_parent(facts, variant)
        yield Attribution(
            variant=variant.id,
            parent=variant.parent,
            delta_to_base=evaluation.overall.delta_bits_per_byte if evaluation else None,
            delta_to_parent=own,
            paired=paired,
            bytes_saved=by_id[variant.parent].size.bytes_on_disk - variant.size.bytes_on_disk,
            median_loss=median(m.loss for m in metrics) if metrics else None,
            median_baseline_loss=median(m.baseline_loss for m in metrics) if metrics else None,
        )


def _delta_to_parent(facts: Facts, variant: Variant) -> tuple[Estimate | None, bool]:
    """Difference to the parent in bits per byte, and whether it is paired by document."""
    measured, parent = (
        facts.evaluations.get(variant.id),
        facts.evaluations.get(variant.parent or ""),
    )
    if variant.id in facts.parent_deltas:
        return facts.parent_deltas[variant.id], True
    if measured and variant.parent == facts.variants[0].id:
        delta = measured.overall.delta_bits_per_byte
        return delta, delta is not None
    if measured is None or parent is None:
        return None, False
    means = measured.overall.bits_per_byte.value, parent.overall.bits_per_byte.value
    return Estimate(value=means[0] - means[1]), False


def _claims(report: Report, document: Document) -> Iterator[Statement]:
    for rule in (_size_claims, _quality_claims, _worst_claims, _divergence_claims, _layer_claims):
        yield from rule(report, document)
    yield from _gate_claims(report, document)
    yield from _artifact_claims(report, document)
    yield from _engine_claims(report, document)
    yield from draft_claims(report, document)


def _place(report: Report, variant: str) -> int:
    return [v.id for v in report.variants].index(variant)


def _size_claims(report: Report, document: Document) -> Iterator[Statement]:
    place = _place(report, report.headline)
    if place == 0:
        return
    size = ("variants", place, "size")
    yield state(
        document,
        "size",
        "{label} takes {bytes} on disk where the base takes {base}: a ratio of {ratio}.",
        label=(pointer("variants", place, "label"), "text"),
        bytes=(pointer(*size, "bytes_on_disk"), "bytes"),
        base=(pointer("variants", 0, "size", "bytes_on_disk"), "bytes"),
        ratio=(pointer(*size, "ratio_total"), "ratio"),
    )
    yield state(
        document,
        "bits",
        "Its tensors hold {checkpoint} bits per parameter of the base, ties counted once.",
        checkpoint=(pointer(*size, "bits_checkpoint"), "bits"),
    )
    if report.variants[place].size.by_role.codes:
        yield state(
            document,
            "matrices",
            "The quantized matrices hold {linear} bits per weight, scales and zero-points counted.",
            linear=(pointer(*size, "bits_linear"), "bits"),
        )


def _quality_claims(report: Report, document: Document) -> Iterator[Statement]:
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None or evaluation.overall.delta_bits_per_byte is None:
        return
    overall = ("evaluations", report.headline, "overall")
    yield state(
        document,
        "quality",
        "Averaged over domains, bits per byte differ from the base by {delta}, "
        "measured on {tokens} tokens of {documents} documents.",
        delta=(pointer(*overall, "delta_bits_per_byte"), "delta"),
        tokens=(pointer(*overall, "tokens"), "count"),
        documents=(pointer(*overall, "documents"), "count"),
    )


def _worst_claims(report: Report, document: Document) -> Iterator[Statement]:
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None or evaluation.worst is None:
        return
    worst = ("evaluations", report.headline, "worst")
    yield state(
        document,
        "worst-domain",
        "The worst domain is {domain}: {delta} bits per byte.",
        domain=(pointer(*worst, "domain"), "text"),
        delta=(pointer(*worst, "delta_bits_per_byte"), "delta"),
    )


def _divergence_claims(report: Report, document: Document) -> Iterator[Statement]:
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None or evaluation.overall.divergence is None:
        return
    divergence = ("evaluations", report.headline, "overall", "divergence")
    yield state(
        document,
        "divergence",
        "The KL divergence from the base is {mean} nats per token on average and {tail} nats at "
        "the 99.9 % quantile; the most likely token agrees at {agreement} of positions.",
        mean=(pointer(*divergence, "mean"), "estimate"),
        tail=(pointer(*divergence, "p999"), "number"),
        agreement=(pointer(*divergence, "top1_agreement", "value"), "share"),
    )
    if report.noise_floor is not None:
        yield state(
            document,
            "noise-floor",
            "The base against itself in another batch size gives {mean} nats per token: "
            "differences as small as that are arithmetic noise.",
            mean=(pointer("noise_floor", "mean", "value"), "number"),
        )


def _layer_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, item in enumerate(report.attribution):
        if item.median_loss is None:
            continue
        variant = _place(report, item.variant)
        facts = report.variants[variant].stage
        simple = facts.simple_method if facts else ""
        yield state(
            document,
            f"layers-{item.variant}",
            f"{{label}}: {{method}} leaves a median relative layer error of {{loss}}; {simple} "
            "would leave {baseline}.",
            label=(pointer("variants", variant, "label"), "text"),
            method=(pointer("variants", variant, "stage", "method"), "text"),
            loss=(pointer("attribution", place, "median_loss"), "number"),
            baseline=(pointer("attribution", place, "median_baseline_loss"), "number"),
        )


def _gate_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, gate in enumerate(report.gates):
        entry = ("gates", place)
        in_bytes = gate.gate.endswith("bytes")
        measured = (*entry, "estimate", "value") if in_bytes else (*entry, "estimate")
        yield state(
            document,
            f"gate-{place}",
            "{verdict} on {gate}: measured {estimate}, the limit is {limit}.",
            verdict=(pointer(*entry, "verdict"), "text"),
            gate=(pointer(*entry, "gate"), "text"),
            estimate=(pointer(*measured), "bytes" if in_bytes else "estimate"),
            limit=(pointer(*entry, "limit"), "bytes" if in_bytes else "number"),
        )


_QUANTIZER = (
    "{label} is the work of a second quantizer, {quantizer}: it rounded the weights of {parent} "
    "itself, and none of our codes are in its file."
)
_EMBEDDING = (
    "{label} holds the codes of {parent} as they are; its embedding, and a head that was dense, "
    "are rounded by {quantizer}, which this row measures."
)


def _artifact_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, variant in enumerate(report.variants):
        if variant.artifact is None or not variant.artifact.reload_ok:
            continue
        artifact = ("variants", place, "artifact")
        if variant.artifact.quantizer is not None:
            yield state(
                document,
                f"quantizer-{variant.id}",
                _EMBEDDING if variant.artifact.embedding else _QUANTIZER,
                label=(pointer("variants", place, "label"), "text"),
                quantizer=(pointer(*artifact, "quantizer"), "text"),
                parent=(pointer("variants", place, "parent"), "text"),
            )
            continue
        found = next(key for key in _READ_BACK if getattr(variant.artifact, key) is not None)
        asked = {check.sha256 for check in report.engine_checks if check.verdict == "PASS"}
        ran = found != "max_weight_difference" or variant.artifact.sha256 in asked
        yield state(
            document,
            f"reload-{variant.id}",
            "{label} was read back from disk as {format}; "
            + ("" if ran else _NOT_ASKED)
            + _READ_BACK[found],
            label=(pointer("variants", place, "label"), "text"),
            format=(pointer(*artifact, "format"), "text"),
            difference=(pointer(*artifact, found), "number"),
        )


_READ_BACK = {
    "max_logit_difference": "its logits differ from those in memory by at most {difference}.",
    "max_weight_difference": "the weights it holds differ from those in memory by at most "
    "{difference} of the largest in their matrix.",
    "max_logprob_difference": "log-probabilities that its engine computes differ from those in "
    "memory by at most {difference} nats.",
}
_NOT_ASKED = "no engine loaded it here, but "


def _engine_claims(report: Report, document: Document) -> Iterator[Statement]:
    for place, check in enumerate(report.engine_checks):
        if check.verdict == "PASS":
            yield _engine_statement(
                place,
                document,
                "{title} {version} computes from {format} what was measured: over {tokens} tokens "
                "its log-probabilities differ by {difference} nats on average, and up to {allowed} "
                "would be its arithmetic.",
                tokens=("tokens", "count"),
                difference=("difference", "number"),
                allowed=("allowed", "number"),
            )


def _engine_statement(
    place: int, document: Document, template: str, **more: tuple[str, Style]
) -> Statement:
    fields: dict[str, tuple[str, Style]] = {
        **{name: (name, "text") for name in ("title", "version", "format")},
        **more,
    }
    return state(
        document,
        f"engine-{document['engine_checks'][place]['engine']}-{place}",
        template,
        **{
            name: (pointer("engine_checks", place, field), style)
            for name, (field, style) in fields.items()
            if f"{{{name}}}" in template
        },
    )


def _warnings(report: Report, document: Document) -> Iterator[Statement]:
    rules: tuple[Callable[[Report, Document], Iterator[Statement]], ...] = (
        _run_warnings,
        _size_warnings,
        _artifact_warnings,
        _engine_warnings,
        _contamination_warnings,
        _sampling_warnings,
        _interval_warnings,
        _protocol_warnings,
        _stage_warnings,
        draft_warnings,
    )
    for rule in rules:
        yield from rule(report, document)


def _run_warnings(report: Report, document: Document) -> Iterator[Statement]:
    if report.run.status != "finished":
        yield state(
            document,
            "status",
            "The run is {status}; rows may be missing.",
            status=(pointer("run", "status"), "text"),
        )
    if not report.env.deterministic:
        yield state(document, "nondeterministic", "The run was not deterministic: bytes may vary.")
    if report.base.licence is None:
        yield state(document, "licence", "The licence of the base is unknown: settle it first.")
    if not report.gates:
        yield state(
            document,
            "no-gates",
            "No quality gate was set: nothing here says what loss is too much.",
        )


def _size_warnings(report: Report, document: Document) -> Iterator[Statement]:
    for place, variant in enumerate(report.variants[1:], start=1):
        if variant.size.ratio_total < 1:
            yield state(
                document,
                f"grew-{variant.id}",
                "{label} takes more bytes than the base: a ratio of {ratio}.",
                label=(pointer("variants", place, "label"), "text"),
                ratio=(pointer("variants", place, "size", "ratio_total"), "ratio"),
            )


def _artifact_warnings(report: Report, document: Document) -> Iterator[Statement]:
    for place, variant in enumerate(report.variants):
        if variant.artifact is not None and not variant.artifact.reload_ok:
            yield state(
                document,
                f"reload-{variant.id}",
                "{label} was not read back from disk: memory does not hold it. Load it elsewhere.",
                label=(pointer("variants", place, "label"), "text"),
            )


def _engine_warnings(report: Report, document: Document) -> Iterator[Statement]:
    for place, check in enumerate(report.engine_checks):
        if check.verdict == "FAIL":
            yield _engine_statement(
                place,
                document,
                "{title} does not compute from {format} what was measured: {detail}.",
                detail=("detail", "text"),
            )


def _contamination_warnings(report: Report, document: Document) -> Iterator[Statement]:
    for place, item in enumerate(report.contamination):
        if item.contaminated:
            entry = ("contamination", place)
            yield state(
                document,
                f"contaminated-{item.domain}",
                "Domain {domain} is contaminated: {overlap} of its {ngram}-grams also stand in "
                "the calibration text, so its numbers flatter.",
                domain=(pointer(*entry, "domain"), "text"),
                overlap=(pointer(*entry, "overlap"), "share"),
                ngram=(pointer(*entry, "ngram"), "count"),
            )


def _sampling_warnings(report: Report, document: Document) -> Iterator[Statement]:
    evaluation = report.evaluations.get(report.headline)
    if evaluation is None:
        return
    place = ("evaluations", report.headline)
    if evaluation.protocol.documents_limit is not None:
        yield state(
            document,
            "documents-limit",
            "Evaluated on a sample: at most {limit} of the documents of every domain.",
            limit=(pointer(*place, "protocol", "documents_limit"), "count"),
        )
    if evaluation.overall.tokens < FEW_TOKENS:
        yield state(
            document,
            "few-tokens",
            "With {tokens} tokens the tail quantiles rest on a handful of positions.",
            tokens=(pointer(*place, "overall", "tokens"), "count"),
        )


def _interval_warnings(report: Report, document: Document) -> Iterator[Statement]:
    evaluation = report.evaluations.get(report.headline)
    for domain, score in evaluation.domains.items() if evaluation else ():
        place = ("evaluations", report.headline, "domains", domain)
        if _spans_zero(score):
            yield state(
                document,
                f"spans-zero-{domain}",
                "The interval spans zero on {domain}: {delta} bits per byte.",
                domain=(pointer(*place), "key"),
                delta=(pointer(*place, "delta_bits_per_byte"), "delta"),
            )
        if score.documents < 2:
            yield state(
                document,
                f"one-document-{domain}",
                "Domain {domain} has a single document and therefore no interval.",
                domain=(pointer(*place), "key"),
            )


def _spans_zero(score: Score) -> bool:
    delta = score.delta_bits_per_byte
    if delta is None or delta.low is None or delta.high is None:
        return False
    return delta.low < 0 < delta.high


def _protocol_warnings(report: Report, document: Document) -> Iterator[Statement]:
    base = report.evaluations.get(report.variants[0].id)
    for name, evaluation in report.evaluations.items():
        if base is not None and evaluation.protocol != base.protocol:
            yield state(
                document,
                f"protocol-{name}",
                "{variant} was evaluated under another protocol than the base: do not compare.",
                variant=(pointer("evaluations", name, "variant"), "text"),
            )


def _stage_warnings(report: Report, document: Document) -> Iterator[Statement]:
    for place, variant in enumerate(report.variants[1:], start=1):
        stage = ("variants", place, "stage")
        method: tuple[str, Style] = (pointer(*stage, "method"), "text")
        label: tuple[str, Style] = (pointer("variants", place, "label"), "text")
        if variant.stage is None:
            continue
        if variant.stage.fallbacks:
            yield state(
                document,
                f"fallbacks-{variant.id}",
                "{label}: {method} did not always do what was asked; recorded fallbacks: {count}.",
                label=label,
                method=method,
                count=(pointer(*stage, "fallbacks"), "length"),
            )
        metrics = variant.stage.metrics_per_module
        worse = [i for i, m in enumerate(metrics) if m.loss > m.baseline_loss > 0]
        if worse:
            worst = max(worse, key=lambda i: metrics[i].loss / metrics[i].baseline_loss)
            entry = (*stage, "metrics_per_module", worst)
            yield state(
                document,
                f"worse-than-simple-{variant.id}",
                f"{{label}}: {{method}} is worse than {variant.stage.simple_method} on {{module}}: "
                "{loss} against {baseline}.",
                label=label,
                method=method,
                module=(pointer(*entry, "module"), "text"),
                loss=(pointer(*entry, "loss"), "number"),
                baseline=(pointer(*entry, "baseline_loss"), "number"),
            )
