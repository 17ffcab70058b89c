"""Which methods may follow which: data, and the function that applies it.

The order is prune, recover, rotate, scale, allocate bits, round weights, round the cache,
draft. Every rule names what goes wrong otherwise; sources are the composition rules of the methods'
papers and measurements (folding a rotation after a norm-folded scale cancels the scale to 2e-15).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

ORDER = (
    "prune.*",
    "recover.*",
    "transform.rotate",
    "transform.*",
    "allocate.*",
    "quantize.*",
    "quantize.kv",
    "draft.*",
)
"""Patterns of methods in the order that works; the longest that matches gives the rank."""


@dataclass(frozen=True)
class Forbidden:
    """Two methods of which the second may not come after the first.

    Attributes:
        first: pattern of the earlier stage.
        then: pattern of the later one.
        reason: what goes wrong.
        works: what to do instead; empty when sorting by `ORDER` is the answer.
    """

    first: str
    then: str
    reason: str
    works: str = ""


_CACHE_MOVED = (
    "the scales of the cache were measured on the model as it was; what follows moves its keys "
    "and values"
)

FORBIDDEN = (
    Forbidden(
        "quantize.kv",
        "quantize.kv",
        "the second replaces the scales that the first has measured",
        "keep one of the two",
    ),
    *(
        Forbidden("quantize.kv", then, _CACHE_MOVED)
        for then in ("prune.*", "recover.*", "transform.*", "allocate.*", "quantize.*")
    ),
    Forbidden(
        "quantize.*",
        "prune.*",
        "pruning edits weights that are rounded already, so their codes no longer fit",
    ),
    Forbidden(
        "quantize.*",
        "recover.*",
        "training moves weights off the grid that they were rounded to",
    ),
    Forbidden(
        "quantize.*",
        "transform.*",
        "a transform edits weights that are rounded already; rounding again would add up",
    ),
    Forbidden(
        "quantize.*",
        "allocate.*",
        "bits are allocated before they are spent",
    ),
    Forbidden(
        "transform.awq",
        "transform.rotate",
        "rotation fuses the norms, which cancels the scales folded into them exactly, and mixes "
        "those of values",
    ),
    Forbidden(
        "transform.smoothquant",
        "transform.rotate",
        "rotation fuses the norms, which cancels the scales folded into them exactly, and mixes "
        "those of values",
    ),
    Forbidden(
        "transform.awq",
        "transform.smoothquant",
        "both scale the same edges, and the second undoes what the first balanced",
        "keep one of the two: awq for weight-only formats, smoothquant for 8-bit activations",
    ),
    Forbidden(
        "transform.smoothquant",
        "transform.awq",
        "both scale the same edges, and the second undoes what the first balanced",
        "keep one of the two: awq for weight-only formats, smoothquant for 8-bit activations",
    ),
    Forbidden(
        "transform.awq",
        "transform.awq",
        "the second folds over what the first balanced, on inputs that are balanced already",
        "keep one of the two",
    ),
    Forbidden(
        "transform.smoothquant",
        "transform.smoothquant",
        "the second folds over what the first balanced, on inputs that are balanced already",
        "keep one of the two",
    ),
    Forbidden(
        "allocate.*",
        "allocate.*",
        "the second replaces what the first has chosen",
        "keep one of the two",
    ),
    Forbidden(
        "transform.*",
        "prune.*",
        "after a transform the channels are mixed or rescaled, so pruning by channel misjudges "
        "them",
    ),
    Forbidden(
        "transform.*",
        "recover.*",
        "training after a transform breaks the equivalence that it relies on",
    ),
    Forbidden(
        "recover.*",
        "prune.*",
        "recovery trains weights that pruning then removes, and is lost",
    ),
    Forbidden(
        "allocate.*",
        "transform.*",
        "bits were allocated to weights that the transform changes",
    ),
    Forbidden(
        "allocate.*",
        "prune.*",
        "bits were allocated to weights that pruning removes",
    ),
    Forbidden(
        "allocate.*",
        "recover.*",
        "bits were allocated to weights that training changes",
    ),
    Forbidden(
        "draft.*",
        "*",
        "a draft is distilled against the finished model; a later stage changes its target",
    ),
)


@dataclass(frozen=True)
class Caution:
    """A combination that runs, and of which a user should know something.

    Attributes:
        before: pattern of an earlier stage.
        missing: whether it is the lack of such a stage that matters.
        option: of the later stage.
        values: of that option, to which this applies.
        remark: what to know.
    """

    before: str
    missing: bool
    option: str
    values: tuple[str, ...]
    remark: str


CAUTIONS = (
    Caution(
        "transform.rotate",
        False,
        "weights",
        ("nvfp4",),
        "rotation spreads outliers that groups of 16 with scales of their own hold well: with "
        "Hadamard matrices NVFP4 was reported at 93.8 % of the original instead of 94.7 %; MXFP4 "
        "gains by it",
    ),
    Caution(
        "transform.smoothquant",
        True,
        "activations",
        ("int8",),
        "inputs are rounded to int8 with the outliers that they have; transform.smoothquant "
        "before this stage moves them into the weights, which halved the distance of SmolLM2-135M",
    ),
    Caution(
        "transform.smoothquant",
        False,
        "activations",
        ("none",),
        "SmoothQuant makes weights harder to round so that inputs get easier, and here inputs are "
        "not rounded; transform.awq is made for rounding weights alone",
    ),
)


@dataclass(frozen=True)
class OrderProblem:
    """Stage `index` may not stand where it stands."""

    index: int
    message: str
    hint: str


def order_problems(methods: Sequence[str]) -> Iterator[OrderProblem]:
    """Every stage that may not follow an earlier one; at most one problem per stage.

    Args:
        methods: in the order of the recipe; "" for one that nobody knows.
    """
    for index, method in enumerate(methods):
        for earlier, before in enumerate(methods[:index]):
            if rule := forbidden(before, method):
                message = f"{method} cannot follow {before} (stage {earlier}): {rule.reason}"
                yield OrderProblem(index, message, rule.works or _sorted_hint(methods))
                break


def cautions(earlier: Sequence[str], stage: object) -> Iterator[str]:
    """What to know of a stage after these.

    Args:
        earlier: methods of the stages before it.
        stage: its configuration.
    """
    for caution in CAUTIONS:
        found = any(fnmatchcase(method, caution.before) for method in earlier)
        if found != caution.missing and getattr(stage, caution.option, None) in caution.values:
            yield caution.remark


def forbidden(first: str, then: str) -> Forbidden | None:
    """The rule that forbids `then` after `first`, if there is one."""
    if fnmatchcase(first, "draft.*") and fnmatchcase(then, "draft.*"):
        return None  # several drafts for one target are independent of each other
    for rule in FORBIDDEN:
        if fnmatchcase(first, rule.first) and fnmatchcase(then, rule.then):
            return rule
    return None


def rank(method: str) -> int:
    """Place of a method in `ORDER`; unknown families come last."""
    matches = [pattern for pattern in ORDER if fnmatchcase(method, pattern)]
    return ORDER.index(max(matches, key=len)) if matches else len(ORDER)


def _sorted_hint(methods: Sequence[str]) -> str:
    return f"order that works: {' → '.join(sorted(filter(None, methods), key=rank))}"
