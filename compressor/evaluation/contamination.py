"""How much of the evaluation text the calibration text already holds.

Overlap of long n-grams, the usual evidence of leakage (Brown et al. 2020, appendix C, 13 words).
Code repeats short idioms and has few words, so its unit is 50 characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from compressor.evaluation.results import Contamination
from compressor.evaluation.suites import EvaluationText

WORDS = 13
CHARACTERS = 50
# Shares of n-grams above which a domain counts as contaminated. Below lie quotations and licences
# in text, and in code the idioms of one library (2.4 % between disjoint files of one package).
CONTAMINATED_WORDS = 0.01
CONTAMINATED_CHARACTERS = 0.05

_WORD = re.compile(r"\w+")
_SPACE = re.compile(r"\s+")


def contamination(
    text: EvaluationText, calibration: Iterable[str], code_domains: Iterable[str] = ("code",)
) -> list[Contamination]:
    """Share of every domain's n-grams that also stand in the calibration text of any domain.

    Memory grows with the evaluation text only; the calibration text is read once.

    Args:
        text: what is evaluated.
        calibration: texts the stages were calibrated on.
        code_domains: domains compared by characters instead of words.
    """
    by_character = frozenset(code_domains)
    wanted = {
        domain: {
            gram for document in documents for gram in _grams(domain in by_character, document.text)
        }
        for domain, documents in text.domains.items()
    }
    found = _found(wanted, calibration, by_character)
    return [
        _entry(domain, domain in by_character, len(found[domain]), len(grams))
        for domain, grams in wanted.items()
    ]


def _found(
    wanted: dict[str, set[int]], calibration: Iterable[str], by_character: frozenset[str]
) -> dict[str, set[int]]:
    found: dict[str, set[int]] = {domain: set() for domain in wanted}
    kinds = {domain in by_character for domain in wanted}
    for passage in calibration:
        seen = {kind: _grams(kind, passage) for kind in kinds}
        for domain, grams in wanted.items():
            found[domain] |= grams & seen[domain in by_character]
    return found


def _entry(domain: str, by_character: bool, found: int, total: int) -> Contamination:
    overlap = found / total if total else 0.0
    return Contamination(
        domain=domain,
        ngram=CHARACTERS if by_character else WORDS,
        overlap=overlap,
        contaminated=overlap > (CONTAMINATED_CHARACTERS if by_character else CONTAMINATED_WORDS),
    )


def _grams(by_character: bool, text: str) -> set[int]:
    return _character_grams(text) if by_character else _word_grams(text)


def _word_grams(text: str) -> set[int]:
    words = _WORD.findall(text.lower())
    return set(map(hash, zip(*(words[start:] for start in range(WORDS)), strict=False)))


def _character_grams(text: str) -> set[int]:
    text = _SPACE.sub(" ", text)
    return {hash(text[start : start + CHARACTERS]) for start in range(len(text) - CHARACTERS + 1)}
