"""What a report warns of: each sentence with the numbers behind it."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from compressor.evaluation.results import Score
from compressor.report.draft_statements import draft_warnings
from compressor.report.schema import Report, Statement, Style
from compressor.report.statements import (
    Document,
    engine_statement,
    named_fallbacks,
    pointer,
    state,
)

FEW_TOKENS = 10_000  # fewer, and the 99.9 % quantile rests on less than ten of them


def warnings_of(report: Report, document: Document) -> Iterator[Statement]:
    """What a reader should know before trusting the numbers, in the order of the report.

    Args:
        report: without its sentences.
        document: the same as JSON, which pointers lead into.
    """
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
    for place, item in enumerate(report.deliverables):
        for number, engines in enumerate(item.refusals):
            why = pointer("deliverables", place, "refusals", engines)
            yield state(
                document,
                f"refused-{place}-{number}",
                "{engines} would not load {path}: {why}.",
                engines=(why, "key"),
                path=(pointer("deliverables", place, "path"), "text"),
                why=(why, "text"),
            )


def _engine_warnings(report: Report, document: Document) -> Iterator[Statement]:
    for place, check in enumerate(report.engine_checks):
        if check.verdict == "FAIL":
            yield engine_statement(
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
    yield from _single_documents(report, document)


def _single_documents(report: Report, document: Document) -> Iterator[Statement]:
    """One sentence for all domains whose single document leaves nothing to resample."""
    evaluation = report.evaluations.get(report.headline)
    scores = evaluation.domains if evaluation else {}
    single = [domain for domain, score in scores.items() if score.documents < 2]
    places: dict[str, tuple[str, Style]] = {
        f"domain_{index}": (pointer("evaluations", report.headline, "domains", domain), "key")
        for index, domain in enumerate(single)
    }
    if not places:
        return
    *others, last = (f"{{{name}}}" for name in places)
    one, many = f"Domain {last} has a single document", f"Domains {', '.join(others)} and {last}"
    subject = f"{many} have a single document each" if others else one
    template = f"{subject} and therefore no interval."
    yield state(document, "one-document", template, **places)


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
            named, places = named_fallbacks(variant.stage, *stage)
            yield state(
                document,
                f"fallbacks-{variant.id}",
                f"{{label}}: {{method}} did not always do what was asked; {named}",
                label=label,
                method=method,
                **places,
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
