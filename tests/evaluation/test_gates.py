"""Verdicts: the table of cases, and every margin against an evaluation."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from compressor.errors import UsageError
from compressor.evaluation.gates import Gates, judge, overall_verdict, verdict
from compressor.evaluation.results import (
    Divergence,
    Estimate,
    Evaluation,
    Protocol,
    Score,
    WorstDomain,
)


def estimate(low: float, value: float, high: float) -> Estimate:
    return Estimate(value=value, low=low, high=high)


@pytest.mark.parametrize(
    ("interval", "expected"),
    [
        ((0.1, 0.2, 0.3), "PASS"),
        ((0.1, 0.4, 0.5), "PASS"),  # the limit itself is allowed
        ((0.4, 0.45, 0.6), "INCONCLUSIVE"),  # the value alone would pass
        ((0.4, 0.55, 0.6), "INCONCLUSIVE"),  # the value alone would fail
        ((0.5, 0.55, 0.6), "INCONCLUSIVE"),
        ((0.51, 0.55, 0.6), "FAIL"),
    ],
)
def test_verdict_table(interval: tuple[float, float, float], expected: str) -> None:
    assert verdict(estimate(*interval), 0.5) == expected


def test_no_interval_decides_nothing() -> None:
    assert verdict(Estimate(value=0.0), 0.5) == "INCONCLUSIVE"


def evaluation() -> Evaluation:
    divergence = Divergence(
        mean=estimate(0.01, 0.02, 0.03), median=0.01, p90=0.04, p95=0.05, p99=0.1, p999=0.3,
        maximum=1.0, minimum=0.0, reverse_mean=0.02, top1_agreement=estimate(0.94, 0.95, 0.96),
        flips=50, delta_p_rms=0.02, ccdf=[(0.0, 1.0)],
    )  # fmt: skip
    score = Score(
        documents=12, tokens=1000, bytes=4000, in_calibration=None,
        perplexity=estimate(9, 10, 11), bits_per_byte=estimate(0.9, 1, 1.1),
        delta_bits_per_byte=estimate(0.005, 0.01, 0.015),
        delta_perplexity_ratio=estimate(1.01, 1.02, 1.03), divergence=divergence,
    )  # fmt: skip
    worst = WorstDomain(
        domain="code", delta_bits_per_byte=estimate(0.01, 0.03, 0.05), kl_domain="code",
        kl=estimate(0.03, 0.04, 0.06),
    )  # fmt: skip
    protocol = Protocol(
        id="rolling", length=8, stride=8, bos="prefix", suite="x", text_sha256="", dtype="float32",
        tokenizer_sha256="", backend="", batch=1,
    )  # fmt: skip
    return Evaluation(
        variant="v", protocol=protocol, overall=score, domains={"code": score}, worst=worst,
        worst_tokens=[], kl_by_position=[], seconds=1, peak_bytes=1,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gate", "passes", "undecided", "fails"),
    [
        ("max_kl", 0.05, 0.02, 0.001),
        ("max_worst_domain_kl", 0.06, 0.05, 0.02),
        ("max_bpb_increase", 0.02, 0.01, 0.0),
        ("max_worst_domain_bpb_increase", 0.05, 0.03, 0.0),
        ("max_perplexity_ratio", 1.05, 1.02, 1.0),
        ("min_top1_agreement", 0.9, 0.95, 0.99),
    ],
)
def test_each_margin(gate: str, passes: float, undecided: float, fails: float) -> None:
    for limit, expected in ((passes, "PASS"), (undecided, "INCONCLUSIVE"), (fails, "FAIL")):
        (result,) = judge(Gates(**{gate: limit}), evaluation(), 0)
        assert result.verdict == expected
        assert result.gate == gate
        assert result.sentence.startswith(expected)
        assert result.estimate.low is not None


def test_few_documents_are_named_as_the_reason() -> None:
    """The narrowest domain counts, not the sum; a decided gate has nothing to excuse."""
    many = evaluation()
    few = many.domains["code"].model_copy(update={"documents": 3})
    some = many.model_copy(update={"domains": many.domains | {"prose": few}})
    reason = "wide because one domain has only 3 documents or windows"
    assert reason in judge(Gates(max_kl=0.02), some, 0)[0].sentence
    assert reason not in judge(Gates(max_kl=0.05), some, 0)[0].sentence
    assert "wide" not in judge(Gates(max_kl=0.02), many, 0)[0].sentence


def test_bytes_are_exact_and_need_no_evaluation() -> None:
    assert judge(Gates(max_bytes=100), None, 100)[0].verdict == "PASS"
    result = judge(Gates(max_bytes=1000), None, 1001)[0]
    assert result.verdict == "FAIL"
    assert result.sentence == "FAIL: bytes on disk 1,001; the limit is at most 1,000."


def test_the_worst_verdict_wins() -> None:
    gates = Gates(max_kl=0.05, max_perplexity_ratio=1.02, max_bytes=10)
    assert overall_verdict(judge(gates, evaluation(), 11)) == "FAIL"
    assert overall_verdict(judge(gates, evaluation(), 10)) == "INCONCLUSIVE"
    assert overall_verdict(judge(Gates(max_kl=0.05), evaluation(), 11)) == "PASS"
    assert judge(Gates(), evaluation(), 0) == []
    assert overall_verdict([]) == "PASS"


def test_a_margin_on_something_unmeasured_is_refused() -> None:
    with pytest.raises(UsageError, match="max_kl needs an evaluation"):
        judge(Gates(max_kl=1), None, 0)
    alone = evaluation().model_copy(update={"worst": None})
    with pytest.raises(UsageError, match="max_kl"):
        judge(Gates(max_kl=1), alone, 0)


def test_unknown_margins_are_refused() -> None:
    with pytest.raises(ValidationError, match="max_klm"):
        Gates(max_klm=1)  # type: ignore[call-arg]
