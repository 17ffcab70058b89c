"""From token scores to what the report shows: estimates, quantiles, worst tokens, comparisons."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from compressor.evaluation.measure import TokenScores, require_same
from compressor.evaluation.protocols import TokenizedText
from compressor.evaluation.results import (
    Comparison,
    Divergence,
    Estimate,
    PairedScore,
    Score,
    WorstDomain,
    WorstToken,
)
from compressor.evaluation.statistics import Bootstrap, Floats, Statistic, worst_of

_TOKENS, _BYTES, _NLL, _BASE_NLL, _KL, _AGREE = range(6)
_LN2 = float(np.log(2))


def _ratio(a: int, b: int) -> Statistic:
    """Mean over domains of sum a / sum b, from totals [..., D, K]."""
    return lambda totals: np.asarray((totals[..., a] / totals[..., b]).mean(-1))


def _bits(totals: Floats) -> Floats:
    return _ratio(_NLL, _BYTES)(totals) / _LN2


def _delta_bits(totals: Floats) -> Floats:
    return _bits(totals) - _ratio(_BASE_NLL, _BYTES)(totals) / _LN2


def _delta_nll(totals: Floats) -> Floats:
    return _NLL_MEAN(totals) - _ratio(_BASE_NLL, _TOKENS)(totals)


def _exponential(nll: Estimate) -> Estimate:
    """Perplexity, or a ratio of two, from nats: so both ends of its interval are positive."""
    low, high = (None if end is None else float(np.exp(end)) for end in (nll.low, nll.high))
    return Estimate(value=float(np.exp(nll.value)), low=low, high=high)


_NLL_MEAN = _ratio(_NLL, _TOKENS)
_KL_MEAN, _AGREEMENT = _ratio(_KL, _TOKENS), _ratio(_AGREE, _TOKENS)


class Summary:
    """Everything derived from one variant's token scores.

    Over all domains an average gives every domain equal weight (perplexity: the geometric mean);
    quantiles, flips and the CCDF pool the tokens.

    Args:
        scores: the variant.
        resamples, seed: of the bootstrap.
    """

    def __init__(self, scores: TokenScores, resamples: int = 2000, seed: int = 0) -> None:
        self.scores = scores
        self._sums = [self._cluster_sums(number) for number in range(len(scores.domains))]
        self._single = [Bootstrap([sums], resamples, seed) for sums in self._sums]
        self._all = Bootstrap(self._sums, resamples, seed)

    def domains(self, in_calibration: Mapping[str, bool] | None = None) -> dict[str, Score]:
        """Score of every domain."""
        known = in_calibration or {}
        return {
            name: self._score(self._single[number], number, known.get(name))
            for number, name in enumerate(self.scores.domains)
        }

    def overall(self, in_calibration: Mapping[str, bool] | None = None) -> Score:
        """Score over all domains."""
        return self._score(
            self._all, None, any(in_calibration.values()) if in_calibration else None
        )

    def divergence(self, number: int | None = None) -> Divergence:
        """Distance from the base on one domain, or on all."""
        bootstrap = self._all if number is None else self._single[number]
        return _divergence(self._columns(number), bootstrap)

    def worst(self) -> WorstDomain | None:
        """The domains with the largest losses; None for the base."""
        if self.scores.is_base:
            return None
        bits_domain, bits = self._worst(_delta_bits)
        kl_domain, kl = self._worst(_KL_MEAN)
        return WorstDomain(domain=bits_domain, delta_bits_per_byte=bits, kl_domain=kl_domain, kl=kl)

    def kl_by_position(self) -> list[tuple[int, float]]:
        """Mean KL by the tokens of context before a token, in octaves 1, 2, 4, …"""
        if self.scores.is_base:
            return []
        octave = np.log2(self.scores.position).astype(int)
        return [
            (int(2**power), float(self.scores.kl[octave == power].mean(dtype=np.float64)))
            for power in np.unique(octave)
        ]

    def worst_tokens(
        self, text: TokenizedText, tokenizer: Callable[[], Any], count: int = 10
    ) -> list[WorstToken]:
        """The tokens with the largest KL, each with the text before it; a base has none.

        Args:
            text: the windows.
            tokenizer: gives the one that cut them, if there is anything to decode.
            count: how many tokens.
        """
        if self.scores.is_base:
            return []
        order, decoder = np.argsort(-self.scores.kl, kind="stable")[:count], tokenizer()
        return [self._worst_token(int(slot), text, decoder) for slot in order]

    def _cluster_sums(self, number: int) -> Floats:
        """float64 [clusters, 6] of one domain."""
        columns = self._columns(number)
        _, cluster = np.unique(columns["cluster"], return_inverse=True)
        values = [
            np.ones(len(cluster)),
            columns["sizes"],
            columns["nll"],
            columns["base_nll"],
            columns["kl"],
            columns["top1"] == columns["base_top1"],
        ]
        return np.stack([np.bincount(cluster, weights=value) for value in values], axis=1)

    def _columns(self, number: int | None) -> dict[str, NDArray[Any]]:
        rows = slice(None) if number is None else self.scores.domain == number
        names = ["cluster", "sizes", "nll", "base_nll", "kl", "reverse_kl", "top1", "base_top1"]
        return {name: getattr(self.scores, name)[rows] for name in names}

    def _score(self, bootstrap: Bootstrap, number: int | None, known: bool | None) -> Score:
        sums = self._sums if number is None else [self._sums[number]]
        paired = not self.scores.is_base
        return Score(
            documents=sum(len(part) for part in sums),
            tokens=round(sum(part[:, _TOKENS].sum() for part in sums)),
            bytes=round(sum(part[:, _BYTES].sum() for part in sums)),
            in_calibration=known,
            perplexity=_exponential(bootstrap.interval(_NLL_MEAN)),
            bits_per_byte=bootstrap.interval(_bits),
            delta_bits_per_byte=bootstrap.interval(_delta_bits) if paired else None,
            delta_perplexity_ratio=_exponential(bootstrap.interval(_delta_nll)) if paired else None,
            divergence=self.divergence(number) if paired else None,
        )

    def _worst(self, statistic: Statistic) -> tuple[str, Estimate]:
        names = self.scores.domains
        level = 1 - 0.05 / len(names)
        single = dict(zip(names, (part.interval(statistic) for part in self._single), strict=True))
        joint = dict(
            zip(names, (part.interval(statistic, level) for part in self._single), strict=True)
        )
        return max(names, key=lambda name: single[name].value), worst_of(single, joint)

    def _worst_token(self, slot: int, text: TokenizedText, tokenizer: Any) -> WorstToken:
        starts = np.cumsum([0, *(window.scored for window in text.windows)])
        index = int(np.searchsorted(starts, slot, side="right")) - 1
        window = text.windows[index]
        at = window.first + slot - int(starts[index])
        return WorstToken(
            domain=window.domain,
            document=window.document,
            context=tokenizer.decode(window.tokens[max(0, at - 120) : at].tolist())[-120:],
            token=tokenizer.decode([int(window.tokens[at])]),
            base_probability=float(np.exp(-self.scores.base_nll[slot])),
            variant_probability=float(np.exp(-self.scores.nll[slot])),
            variant_top=tokenizer.decode([int(self.scores.top1[slot])]),
            kl=float(self.scores.kl[slot]),
        )


def compare(a: TokenScores, b: TokenScores, resamples: int = 2000, seed: int = 0) -> Comparison:
    """Pair two variants, token by token, clustered by document: b minus a, or b / a.

    Raises:
        UsageError: they were not measured under one protocol; names the fields that differ.
    """
    require_same(a.protocol, b.protocol)
    sums = [_paired_sums(a, b, number) for number in range(len(a.domains))]
    flipped = a.top1 != b.top1
    has_kl = not (a.is_base and b.is_base)
    return Comparison(
        a=a.variant,
        b=b.variant,
        protocol=a.protocol,
        overall=_paired(Bootstrap(sums, resamples, seed), int(flipped.sum()), has_kl),
        domains={
            name: _paired(
                Bootstrap([sums[number]], resamples, seed),
                int(flipped[a.domain == number].sum()),
                has_kl,
            )
            for number, name in enumerate(a.domains)
        },
    )


def _paired_sums(a: TokenScores, b: TokenScores, number: int) -> Floats:
    """Cluster sums of one domain with `a` in the place of the base."""
    rows = a.domain == number
    _, cluster = np.unique(a.cluster[rows], return_inverse=True)
    values = [
        np.ones(len(cluster)),
        a.sizes[rows],
        b.nll[rows],
        a.nll[rows],
        b.kl[rows].astype(np.float64) - a.kl[rows],
        a.top1[rows] == b.top1[rows],
    ]
    return np.stack([np.bincount(cluster, weights=value) for value in values], axis=1)


def _paired(bootstrap: Bootstrap, flips: int, has_kl: bool) -> PairedScore:
    return PairedScore(
        delta_bits_per_byte=bootstrap.interval(_delta_bits),
        delta_perplexity_ratio=_exponential(bootstrap.interval(_delta_nll)),
        delta_kl=bootstrap.interval(_KL_MEAN) if has_kl else None,
        top1_agreement=bootstrap.interval(_AGREEMENT),
        flips=flips,
    )


def _divergence(columns: dict[str, NDArray[Any]], bootstrap: Bootstrap) -> Divergence:
    kl = columns["kl"].astype(np.float64)
    probability, base_probability = (
        np.exp(-columns[name].astype(np.float64)) for name in ("nll", "base_nll")
    )
    delta_p = probability - base_probability
    median, p90, p95, p99, p999 = np.quantile(kl, [0.5, 0.9, 0.95, 0.99, 0.999]).tolist()
    return Divergence(
        mean=bootstrap.interval(_KL_MEAN),
        median=median,
        p90=p90,
        p95=p95,
        p99=p99,
        p999=p999,
        maximum=float(kl.max()),
        minimum=float(kl.min()),
        reverse_mean=float(columns["reverse_kl"].mean(dtype=np.float64)),
        top1_agreement=bootstrap.interval(_AGREEMENT),
        flips=int((columns["top1"] != columns["base_top1"]).sum()),
        delta_p_rms=float(np.sqrt((delta_p**2).mean())),
        ccdf=_ccdf(kl),
    )


def _ccdf(kl: NDArray[np.float64], points: int = 60) -> list[tuple[float, float]]:
    """(KL, share of tokens above it): from all tokens to one, evenly in the logarithm."""
    shares = np.geomspace(1, 1 / len(kl), points)
    return [(float(value), float(share))
            for value, share in zip(np.quantile(kl, 1 - shares), shares, strict=True)]  # fmt: skip
