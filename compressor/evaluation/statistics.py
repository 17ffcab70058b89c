"""Intervals for ratios of sums over clustered text.

Tokens of one document are not independent, so documents are resampled, not tokens; base and
variant are resampled together (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, §2-4).
Every number we report (mean NLL, bits per byte, mean KL, agreement) is a ratio of two sums over
documents. A resample is then a vector of multinomial counts, and one matrix product gives the sums
of all metrics in all resamples. `scipy.stats.bootstrap` cannot resample domains separately
(stratified) while keeping metrics paired inside them, which is why the loop is ours.

Two or three documents have too few different resamples to reach the tails of anything: below
`FEW_DOCUMENTS` in a domain, the interval is Student's, from the jackknife.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri, stdtrit

from compressor.evaluation.results import FEW_DOCUMENTS, Estimate

Floats = NDArray[np.float64]
Statistic = Callable[[Floats], Floats]


class Bootstrap:
    """Resampled totals of clustered sums, one stratum per domain.

    Args:
        domains: for every domain float64 [clusters, K], the K sums of every cluster.
        resamples: number of bootstrap samples.
        seed: of the resampling; the same seed yields the same interval.
    """

    def __init__(self, domains: Sequence[Floats], resamples: int = 2000, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self._sizes = np.array([len(sums) for sums in domains])
        self._totals = np.stack([sums.sum(0) for sums in domains])
        self._draws = np.stack(
            [
                rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), resamples) @ sums
                for sums in domains
            ],
            axis=1,
        )
        self._left_out = [self._without_each(stratum, sums) for stratum, sums in enumerate(domains)]

    def _without_each(self, stratum: int, sums: Floats) -> Floats:
        """Totals [clusters, D, K] with one cluster of one stratum left out."""
        totals = np.repeat(self._totals[None], len(sums), axis=0)
        totals[:, stratum] -= sums
        return totals

    def interval(self, statistic: Statistic, level: float = 0.95) -> Estimate:
        """Bias-corrected, accelerated interval (Efron 1987); of few clusters, Student's.

        Args:
            statistic: from totals [..., D, K] to a value [...].
            level: coverage of the two-sided interval.

        None with a stratum of one cluster, and a point where all clusters agree.

        A bootstrap over n clusters is narrow by sqrt((n-1)/n) and knows no t quantiles; the levels
        are expanded as in Hesterberg (2015, The American Statistician 69, §4), taking the smallest
        stratum for n and the sum of the strata's degrees of freedom.
        """
        value = float(statistic(self._totals))
        if self._sizes.min() < 2:
            return Estimate(value=value)
        if self._sizes.min() < FEW_DOCUMENTS:
            half = self._student_half_width(statistic, level)
            return Estimate(value=value, low=value - half, high=value + half)
        draws = np.sort(statistic(self._draws))
        if draws[0] == draws[-1]:
            return Estimate(value=value, low=value, high=value)
        low, high = np.quantile(draws, self._levels(draws, value, statistic, level))
        return Estimate(value=value, low=float(low), high=float(high))

    def _student_half_width(self, statistic: Statistic, level: float) -> float:
        """Half of a Student t interval around the value.

        Variances are the jackknife's, which add up over strata; degrees of freedom are
        Satterthwaite's (1946, Biometrics Bulletin 2, 110). The interval may reach beyond what the
        quantity can be, a KL below zero say: cut there, its half would understate the upper end.
        """
        influences = self._influences(statistic)
        variances = np.array([len(own) / (len(own) - 1) * (own**2).sum() for own in influences])
        total = variances.sum()
        if total == 0:
            return 0.0
        freedom = 1 / ((variances / total) ** 2 / (self._sizes - 1)).sum()
        return float(stdtrit(freedom, (1 + level) / 2) * np.sqrt(total))

    def _levels(self, draws: Floats, value: float, statistic: Statistic, level: float) -> Floats:
        """The two quantiles of the bootstrap distribution that bound the interval."""
        smallest = self._sizes.min()
        widening = np.sqrt(smallest / (smallest - 1))
        z = widening * stdtrit((self._sizes - 1).sum(), (1 + level) / 2)
        share = (np.mean(draws < value) + np.mean(draws <= value)) / 2
        bias = ndtri(np.clip(share, 1 / len(draws), 1 - 1 / len(draws)))
        tails = bias + np.array([-z, z])
        return np.asarray(ndtr(bias + tails / (1 - self._acceleration(statistic) * tails)))

    def _acceleration(self, statistic: Statistic) -> float:
        """Skewness of the jackknife influences / 6, over all strata."""
        joined = np.concatenate(self._influences(statistic))
        spread = float((joined**2).sum()) ** 1.5
        return float((joined**3).sum()) / (6 * spread) if spread > 0 else 0.0

    def _influences(self, statistic: Statistic) -> list[Floats]:
        """By stratum, what every cluster [clusters] adds to the value, by the jackknife."""
        values = [statistic(totals) for totals in self._left_out]
        return [(own.mean() - own) * (len(own) - 1) / len(own) for own in values]


def worst_of(estimates: dict[str, Estimate], simultaneous: dict[str, Estimate]) -> Estimate:
    """Interval of the largest of several quantities, one per domain.

    The largest observed value is biased upwards, and a bootstrap of the maximum shares the bias.
    Two simple bounds hold whatever domain is truly the worst: its own upper end is at most the
    largest upper end, so that one bounds the maximum from above at the level of a single interval;
    from below, the largest lower end does, provided the lower ends hold together (Bonferroni).

    Args:
        estimates: intervals at the wanted level.
        simultaneous: intervals at level 1 - (1 - level) / number of domains.
    """
    value = max(estimate.value for estimate in estimates.values())
    highs = [estimate.high for estimate in estimates.values() if estimate.high is not None]
    lows = [estimate.low for estimate in simultaneous.values() if estimate.low is not None]
    if len(highs) < len(estimates) or len(lows) < len(simultaneous):
        return Estimate(value=value)
    return Estimate(value=value, low=min(max(lows), value), high=max(highs))
