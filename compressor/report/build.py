"""From the facts of a run to its report: what follows is computed here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median

from compressor.errors import VerificationError
from compressor.evaluation.results import Estimate
from compressor.report import statements
from compressor.report.claims import claims_of
from compressor.report.schema import Attribution, Facts, Report, RunFallback, Variant, Verdict
from compressor.report.warnings import warnings_of


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
    claims, warnings = tuple(claims_of(draft, document)), tuple(warnings_of(draft, document))
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
