"""Matrices of a model: what each is, and patterns that select among them."""

from __future__ import annotations

import difflib
import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from compressor.types import ActivationScheme, WeightScheme

ROLE_SETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("gate", "up", "gate_up", "down", "fc_in", "fc_out"),
}
"""Pattern words that stand for several roles; `linear` and `all` are built from them."""

Kind = Literal["linear", "head", "embedding", "expert", "router", "conv1d"]
_KINDS: Mapping[str, Kind] = {"head": "head", "embed": "embedding", "router": "router"}
_NOT_IN_ALL = ("router", "position")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix.

    Attributes:
        name: of the tensor on disk, without `.weight`.
        shape: (out, in), whichever way round it is stored.
        role: `q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `gate_up`, `down`, `fc_in`, `fc_out`,
            `router`, `embed`, `position`, `project_in`, `project_out`, `head`.
        block: index of its block; None outside the blocks.
        input_group: matrices with the same group see the same input, hence share one Hessian.
        scheme: the integer grid that a plan has assigned; None while dense.
        rounding: number of the stage that assigned it, among those that do; 0 while dense.
        activations: how its inputs are rounded while the model runs; None when they are not.
        allotted: the grid that a rounder is to use in place of its own; None leaves it the choice.
        expert: index of its expert in a mixture of experts.
        transposed_on_disk: stored [in, out].
    """

    name: str
    shape: tuple[int, int]
    role: str
    block: int | None
    input_group: str
    scheme: WeightScheme | None = None
    rounding: int = 0
    activations: ActivationScheme | None = None
    allotted: WeightScheme | None = None
    expert: int | None = None
    transposed_on_disk: bool = False

    @property
    def tensor(self) -> str:
        """Name of the tensor on disk."""
        return f"{self.name}.weight"

    @property
    def disk_shape(self) -> tuple[int, int]:
        """Shape of the tensor on disk."""
        out, in_ = self.shape
        return (in_, out) if self.transposed_on_disk else (out, in_)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> Kind:
        """What it is to whoever packs it."""
        if self.transposed_on_disk:
            return "conv1d"
        if self.role in _KINDS:
            return _KINDS[self.role]
        return "linear" if self.expert is None else "expert"


@dataclass(frozen=True)
class Unmatched:
    """A pattern that selected nothing, and what may have been meant (or "")."""

    pattern: str
    suggestion: str


@dataclass(frozen=True)
class Selection:
    """What patterns selected: matrices in model order, and the patterns that selected none."""

    matrices: tuple[Matrix, ...]
    unmatched: tuple[Unmatched, ...]


def _plays(matrix: Matrix, word: str) -> bool:
    """Whether a role word covers the matrix."""
    if word == "all":
        return matrix.role not in _NOT_IN_ALL
    if word == "linear":
        return matrix.block is not None and matrix.role != "router"
    return matrix.role == word or matrix.role in ROLE_SETS.get(word, ())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A question with the nearest of the known words; empty where none is near."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def select(matrices: Sequence[Matrix], patterns: Iterable[str], tied: bool) -> Selection:
    """Matrices that any of the patterns matches; `Architecture.select` says what they may be.

    Args:
        matrices: of the model, in its order.
        patterns: what to look for.
        tied: whether the head is the embedding, which then has to be said.
    """
    chosen: set[str] = set()
    unmatched = []
    for pattern in patterns:
        names, suggestion = _match(matrices, pattern, tied)
        chosen |= names
        if not names:
            unmatched.append(Unmatched(pattern, suggestion))
    found = (matrix for matrix in matrices if matrix.name in chosen)
    return Selection(tuple(found), tuple(unmatched))


def _match(matrices: Sequence[Matrix], pattern: str, tied: bool) -> tuple[set[str], str]:
    """Names that one pattern selects; if none, a suggestion."""
    every = [matrix.name for matrix in matrices]
    if pattern.startswith("re:"):
        try:
            expression = re.compile(pattern[3:])
        except re.error as error:
            return set(), f"not a regular expression: {error}"
        return {name for name in every if expression.match(name)}, ""
    names = {matrix.name for matrix in matrices if _plays(matrix, pattern)}
    names |= set(fnmatch.filter(every, pattern))
    return names, "" if names else _suggest(matrices, pattern, tied)


def _suggest(matrices: Sequence[Matrix], pattern: str, tied: bool) -> str:
    if pattern == "head" and tied:
        return "the head is tied to the embedding and has no matrix of its own; untie it first"
    words = {"linear", "all", *ROLE_SETS, *(matrix.role for matrix in matrices)}
    return did_you_mean(pattern, (*words, *(matrix.name for matrix in matrices))) or (
        f"roles of this model: {', '.join(sorted(words))}"
    )
