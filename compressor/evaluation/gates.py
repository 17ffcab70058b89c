"""The user's margins, and whether the evidence keeps them.

Light on purpose: recipes import it, so the command line does.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from compressor.errors import UsageError
from compressor.evaluation.results import FEW_DOCUMENTS, Estimate, Evaluation, GateVerdict
from compressor.section import Section

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]


class Gates(Section):
    """Margins that the last variant must keep; a margin left out is not judged."""

    max_kl: float | None = Field(
        None, ge=0, description="Mean KL(base || variant) over all domains, nats per token."
    )
    max_worst_domain_kl: float | None = Field(
        None, ge=0, description="Mean KL(base || variant) in the worst domain, nats per token."
    )
    max_bpb_increase: float | None = Field(
        None, description="Increase of bits per byte over all domains."
    )
    max_worst_domain_bpb_increase: float | None = Field(
        None, description="Increase of bits per byte in the worst domain."
    )
    max_perplexity_ratio: float | None = Field(
        None, gt=0, description="Perplexity of the variant over that of the base."
    )
    max_bytes: int | None = Field(
        None, ge=0, description="Bytes on disk of every file needed to load the variant."
    )
    min_top1_agreement: float | None = Field(
        None, ge=0, le=1, description="Share of tokens whose top prediction is the base's."
    )


_NAMES = {
    "max_kl": "mean KL from the base (nats/token)",
    "max_worst_domain_kl": "mean KL in the worst domain (nats/token)",
    "max_bpb_increase": "increase in bits per byte",
    "max_worst_domain_bpb_increase": "increase in bits per byte in the worst domain",
    "max_perplexity_ratio": "perplexity ratio to the base",
    "max_bytes": "bytes on disk",
    "min_top1_agreement": "top-1 agreement with the base",
}


def judge(gates: Gates, evaluation: Evaluation | None, bytes_on_disk: int) -> list[GateVerdict]:
    """One verdict per margin that is set, in the order of `Gates`.

    Args:
        gates: the margins.
        evaluation: of the variant against the base; None where nothing was measured.
        bytes_on_disk: every file needed to load the variant.

    Raises:
        UsageError: a margin is set on something that was not measured.
    """
    verdicts = []
    for gate in Gates.model_fields:
        limit = getattr(gates, gate)
        if limit is not None:
            estimate = _estimate(gate, evaluation, bytes_on_disk)
            verdicts.append(_judge_one(gate, float(limit), estimate, _undecided(evaluation)))
    return verdicts


def verdict(estimate: Estimate, limit: float) -> Verdict:
    """Non-inferiority of a quantity that should not exceed `limit`.

    PASS when the whole interval is within the limit, FAIL when all of it is beyond, INCONCLUSIVE
    when it straddles the limit or there is no interval.
    """
    if estimate.low is None or estimate.high is None:
        return "INCONCLUSIVE"
    if estimate.high <= limit:
        return "PASS"
    return "FAIL" if estimate.low > limit else "INCONCLUSIVE"


def overall_verdict(verdicts: list[GateVerdict]) -> Verdict:
    """FAIL if any gate fails, else INCONCLUSIVE if any is, else PASS."""
    found = {entry.verdict for entry in verdicts}
    if "FAIL" in found:
        return "FAIL"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in found else "PASS"


def _undecided(evaluation: Evaluation | None) -> str:
    """Why an interval straddles a limit, and what would help."""
    scores = evaluation.domains.values() if evaluation else ()
    fewest = min((score.documents for score in scores), default=FEW_DOCUMENTS)
    few = f", wide because one domain has only {fewest} documents or windows,"
    wide = few if fewest < FEW_DOCUMENTS else ""
    return f"the 95 % interval{wide} straddles the limit; more evaluation text would decide"


def _judge_one(gate: str, limit: float, estimate: Estimate, undecided: str) -> GateVerdict:
    outcome = _at_least(estimate, limit) if gate.startswith("min_") else verdict(estimate, limit)
    return GateVerdict(
        gate=gate,
        limit=limit,
        estimate=estimate,
        verdict=outcome,
        sentence=_sentence(gate, limit, estimate, outcome, undecided),
    )


def _at_least(estimate: Estimate, limit: float) -> Verdict:
    """`verdict` for a quantity that should not fall below `limit`."""
    low = None if estimate.high is None else -estimate.high
    high = None if estimate.low is None else -estimate.low
    return verdict(Estimate(value=-estimate.value, low=low, high=high), -limit)


def _estimate(gate: str, evaluation: Evaluation | None, bytes_on_disk: int) -> Estimate:
    if gate == "max_bytes":
        size = float(bytes_on_disk)
        return Estimate(value=size, low=size, high=size)
    if evaluation is None or evaluation.worst is None or evaluation.overall.divergence is None:
        raise UsageError(f"gate {gate} needs an evaluation against the base, but none was made")
    overall, divergence = evaluation.overall, evaluation.overall.divergence
    measured = {
        "max_kl": divergence.mean,
        "max_worst_domain_kl": evaluation.worst.kl,
        "max_bpb_increase": overall.delta_bits_per_byte,
        "max_worst_domain_bpb_increase": evaluation.worst.delta_bits_per_byte,
        "max_perplexity_ratio": overall.delta_perplexity_ratio,
        "min_top1_agreement": divergence.top1_agreement,
    }[gate]
    if measured is None:
        raise UsageError(f"gate {gate} needs a paired evaluation, but the base alone was measured")
    return measured


def _sentence(gate: str, limit: float, estimate: Estimate, outcome: Verdict, undecided: str) -> str:
    name, bound = _NAMES[gate], "at least" if gate.startswith("min_") else "at most"
    if gate == "max_bytes":
        return f"{outcome}: {name} {estimate.value:,.0f}; the limit is {bound} {limit:,.0f}."
    if estimate.low is None or estimate.high is None:
        return (
            f"{outcome}: {name} {estimate.value:.4g}, without an interval because one domain has "
            f"a single cluster of text; the limit is {bound} {limit:.4g}."
        )
    reason = {
        "PASS": "the whole 95 % interval keeps the limit",
        "FAIL": "the whole 95 % interval breaks the limit",
        "INCONCLUSIVE": undecided,
    }[outcome]
    return (
        f"{outcome}: {name} {estimate.value:.4g} [{estimate.low:.4g}, {estimate.high:.4g}], "
        f"limit {bound} {limit:.4g}: {reason}."
    )
