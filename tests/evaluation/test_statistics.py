"""Intervals: coverage on simulated clusters, agreement with scipy, determinism."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from compressor.evaluation.results import Estimate
from compressor.evaluation.statistics import Bootstrap, worst_of

Floats = NDArray[np.float64]


def ratio(totals: Floats) -> Floats:
    return np.asarray((totals[..., 1] / totals[..., 0]).mean(-1))


def simulate(rng: np.random.Generator, clusters: int, mean: float = 1.0) -> Floats:
    """Tokens and summed loss per document; documents differ, so tokens are dependent."""
    tokens = rng.integers(80, 300, clusters).astype(float)
    level = mean * rng.gamma(4, 0.25, clusters)
    return np.stack([tokens, rng.gamma(tokens * level)], axis=1)


@pytest.mark.parametrize(("domains", "clusters"), [(1, 24), (3, 12)])
def test_nominal_95_percent_covers(domains: int, clusters: int) -> None:
    rng = np.random.default_rng(5)
    hits = 0
    for run in range(300):
        estimate = Bootstrap(
            [simulate(rng, clusters) for _ in range(domains)], resamples=600, seed=run
        ).interval(ratio)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 1.0 <= estimate.high
    assert 0.90 <= hits / 300 <= 0.98


@pytest.mark.parametrize(("domains", "clusters"), [(1, 2), (1, 3), (1, 4), (6, 2)])
def test_few_documents_are_covered_too(domains: int, clusters: int) -> None:
    """A bootstrap covers 51, 73, 83 and 86 % of these."""
    rng = np.random.default_rng(5)
    hits = 0
    for run in range(300):
        parts = [simulate(rng, clusters) for _ in range(domains)]
        estimate = Bootstrap(parts, resamples=100, seed=run).interval(ratio)
        assert estimate.low is not None
        assert estimate.high is not None
        hits += estimate.low <= 1.0 <= estimate.high
    assert hits / 300 >= 0.90


def test_one_domain_of_few_documents_makes_the_interval_students() -> None:
    """Of a mean, jackknife and textbook agree; of two domains, Welch's degrees of freedom hold."""
    rng = np.random.default_rng(2)
    near, far = (np.stack([np.ones(n), rng.normal(size=n)], axis=1) for n in (5, 12))
    alone = stats.ttest_1samp(near[:, 1], 0).confidence_interval()
    assert Bootstrap([near]).interval(ratio).high == pytest.approx(alone.high)
    found = Bootstrap([near, far * [1, -1]]).interval(ratio)
    welch = stats.ttest_ind(near[:, 1], far[:, 1], equal_var=False).confidence_interval()
    assert (found.low, found.high) == pytest.approx((welch.low / 2, welch.high / 2))


def test_ignoring_the_clusters_would_not_cover() -> None:
    """The mistake that we avoid, so that the test above is known to be able to fail."""
    rng = np.random.default_rng(5)
    hits = 0
    for _ in range(200):
        sums = simulate(rng, 24)
        value, se = sums[:, 1].sum() / sums[:, 0].sum(), np.sqrt(1 / sums[:, 0].sum())
        hits += abs(value - 1) < 1.96 * se
    assert hits / 200 < 0.5


def test_agrees_with_scipy_on_one_stratum() -> None:
    sums = simulate(np.random.default_rng(3), 60)
    ours = Bootstrap([sums], resamples=20_000).interval(ratio)
    theirs = stats.bootstrap(
        (sums[:, 0], sums[:, 1]),
        lambda tokens, loss, axis: loss.sum(axis) / tokens.sum(axis),
        paired=True, vectorized=True, method="BCa", n_resamples=20_000, rng=1,
    ).confidence_interval  # fmt: skip
    width = theirs.high - theirs.low
    assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
    assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_same_seed_same_interval() -> None:
    sums = simulate(np.random.default_rng(3), 20)
    assert Bootstrap([sums], 500, 1).interval(ratio) == Bootstrap([sums], 500, 1).interval(ratio)
    assert Bootstrap([sums], 500, 1).interval(ratio) != Bootstrap([sums], 500, 2).interval(ratio)


def test_one_cluster_has_no_interval() -> None:
    sums = np.array([[10.0, 20.0]])
    assert Bootstrap([sums]).interval(ratio) == Estimate(value=2.0)
    assert Bootstrap([sums, np.tile(sums, (5, 1))]).interval(ratio).low is None


@pytest.mark.parametrize("clusters", [2, 12])
def test_a_constant_has_a_point_interval(clusters: int) -> None:
    sums = np.tile([[10.0, 0.0]], (clusters, 1))
    assert Bootstrap([sums]).interval(ratio) == Estimate(value=0, low=0, high=0)


def test_domains_are_resampled_apart() -> None:
    """Large differences between domains are no sampling error when the domains are given."""
    rng = np.random.default_rng(0)
    near = [np.stack([np.full(20, 10.0), 10 * (m + 0.01 * rng.normal(size=20))], 1) for m in (1, 9)]
    estimate = Bootstrap(near).interval(ratio)
    assert estimate.low is not None
    assert estimate.high is not None
    assert estimate.value == pytest.approx(5, abs=0.01)
    assert estimate.high - estimate.low < 0.02


def test_the_worst_domain_is_covered_although_it_is_picked() -> None:
    """Six equal domains: the largest observed value is too high, its bounds still hold."""
    rng = np.random.default_rng(11)
    misses = 0
    for run in range(150):
        parts = [Bootstrap([simulate(rng, 16)], 500, run) for _ in range(6)]
        single = {str(i): part.interval(ratio) for i, part in enumerate(parts)}
        joint = {str(i): part.interval(ratio, 1 - 0.05 / 6) for i, part in enumerate(parts)}
        worst = worst_of(single, joint)
        assert worst.low is not None
        assert worst.high is not None
        assert worst.low <= worst.value <= worst.high
        misses += not worst.low <= 1.0 <= worst.high
    assert misses / 150 <= 0.08


def test_the_worst_has_no_interval_if_one_domain_has_none() -> None:
    whole, bare = Estimate(value=1, low=0, high=2), Estimate(value=3)
    assert worst_of({"a": whole, "b": bare}, {"a": whole, "b": bare}) == Estimate(value=3)


def test_the_worst_is_bounded_by_the_largest_ends() -> None:
    single = {"a": Estimate(value=3, low=2, high=4), "b": Estimate(value=2, low=1, high=9)}
    joint = {"a": Estimate(value=3, low=1.5, high=5), "b": Estimate(value=2, low=0.5, high=11)}
    assert worst_of(single, joint) == Estimate(value=3, low=1.5, high=9)
