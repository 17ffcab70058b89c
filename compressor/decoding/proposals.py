"""What a draft proposes, and the drafts that need no training: a copy of the text, a small model.

A draft is shown every token that the target has committed. A trained draft answers with logits
token by token; from them grows a chain or a tree of proposals.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compressor.decoding.cached import CachedModel
from compressor.numerics.speculative import ROOT, Sampling, sample, warp


@dataclass(frozen=True)
class Chain:
    """One token after the other.

    Attributes:
        tokens: γ, how many are proposed before the target looks at them.
    """

    tokens: int

    @property
    def depth(self) -> int:
        """Most tokens that one pass can accept."""
        return self.tokens

    def shallower(self, depth: int) -> Chain:
        """At most so many tokens."""
        return Chain(min(depth, self.tokens))


@dataclass(frozen=True)
class Tree:
    """Several continuations at once, grown best-first by the probability of their path.

    Each level expands the `width` likeliest nodes of the one before by their `width` likeliest
    children; of everything grown the `nodes` likeliest are verified (Li et al. 2024, EAGLE-2,
    arXiv:2406.16858). A node is never likelier than its parent, so the kept ones form a tree.

    Attributes:
        depth: levels, most tokens that one pass can accept.
        width: nodes expanded at each level, and children of each.
        nodes: proposals that the target verifies in one pass.
    """

    depth: int
    width: int
    nodes: int

    def shallower(self, depth: int) -> Tree:
        """At most so many levels."""
        return replace(self, depth=min(depth, self.depth))


Shape = Chain | Tree


@dataclass(frozen=True)
class Proposal:
    """Tokens for the target to verify.

    Attributes:
        tokens: by row, at most as many for one row as for another.
        parents: by row, index of each token's predecessor or `ROOT`; always an earlier index.
        probabilities: [B, n, V], what each token was drawn from; None when it was chosen without
            chance.
    """

    tokens: tuple[tuple[int, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    probabilities: Tensor | None = None


@dataclass(frozen=True)
class Committed:
    """What the target has just processed and kept, with what follows.

    Attributes:
        inputs: by row, tokens that are now in the target's cache and were not before.
        features: by row, [len(inputs), F], the target's hidden states at these tokens, or None.
        following: by row, the next token, which the target has not seen yet.
    """

    inputs: tuple[tuple[int, ...], ...]
    features: tuple[Tensor, ...] | None
    following: tuple[int, ...]


class Draft(Protocol):
    """Whoever proposes.

    Attributes:
        layers: hidden states of the target that `Committed.features` must hold, side by side.
    """

    layers: tuple[int, ...]

    def attach(self, target: CachedModel) -> None:
        """The target that is going to verify; most drafts need no more than what it commits."""

    def start(self, rows: int) -> None:
        """A new batch begins."""

    def observe(self, committed: Committed) -> None:
        """The target has committed tokens."""

    def propose(
        self, shape: Shape, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """Guess what follows the last committed token of every row."""

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""


class PromptLookup:
    """Copies what followed the last occurrence of the latest tokens; no model at all.

    Saxena 2023, prompt lookup decoding; transformers calls it `prompt_lookup_num_tokens`.

    Args:
        longest: tokens of the longest match that is tried first.
    """

    layers: tuple[int, ...] = ()

    def __init__(self, longest: int = 3) -> None:
        self.longest = longest
        self._texts: list[list[int]] = []

    def attach(self, target: CachedModel) -> None:
        """Any target will do."""

    def start(self, rows: int) -> None:
        """Forget all text."""
        self._texts = [[] for _ in range(rows)]

    def observe(self, committed: Committed) -> None:
        """Remember what was committed."""
        for row, (inputs, following) in enumerate(
            zip(committed.inputs, committed.following, strict=True)
        ):
            known = self._texts[row]
            # The first of the inputs after the prompt is the token that followed last time.
            known.extend(inputs[1:] if known else inputs)
            known.append(following)

    def propose(
        self, shape: Shape, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """A chain for every row; empty where nothing matches."""
        del sampling, generator
        found = [tuple(_copied(text, self.longest, shape.depth)) for text in self._texts]
        chains = [tuple(range(ROOT, len(tokens) - 1)) for tokens in found]
        return Proposal(tuple(found), tuple(chains))

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self._texts = [self._texts[row] for row in rows]


def _copied(text: list[int], longest: int, count: int) -> list[int]:
    """The tokens that followed the latest earlier occurrence of the longest matching suffix."""
    for size in range(min(longest, len(text) - 1), 0, -1):
        suffix = text[-size:]
        for start in range(len(text) - size - 1, -1, -1):
            if text[start : start + size] == suffix:
                return text[start + size : start + size + count]
    return []


class NetworkDraft(ABC):
    """A draft that computes logits; chains and trees grow here for all of them.

    A draft may know only part of the vocabulary; its logits are -inf elsewhere.
    """

    layers: tuple[int, ...] = ()

    def attach(self, target: CachedModel) -> None:  # noqa: B027 — only some drafts need it
        """The target that is going to verify."""

    @abstractmethod
    def start(self, rows: int) -> None:
        """A new batch begins."""

    @abstractmethod
    def observe(self, committed: Committed) -> None:
        """The target has committed tokens."""

    @abstractmethod
    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""

    @abstractmethod
    def root(self) -> Tensor:
        """Logits [B, V] of the token that follows everything committed."""

    @abstractmethod
    def grow(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits [B, k, V] after each of k new nodes.

        Args:
            tokens: int64 [B, k].
            parents: int64 [B, k], indices of nodes grown since `root`, or `ROOT`.
        """

    def propose(
        self, shape: Shape, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """A chain drawn from the draft, or the likeliest tree."""
        if isinstance(shape, Tree):
            return self._tree(shape)
        return self._chain(shape, sampling, generator)

    def _chain(
        self, shape: Chain, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        logits, tokens, drawn_from = self.root(), [], []
        for place in range(shape.tokens):
            drawn_from.append(warp(logits, sampling) if not sampling.greedy else logits)
            # Without chance the likeliest token is the proposal, and no distribution is needed.
            token = logits.argmax(-1) if sampling.greedy else sample(drawn_from[-1], generator)
            tokens.append(token)
            if place + 1 < shape.tokens:
                logits = self.grow(token[:, None], torch.full_like(token, place - 1)[:, None])[:, 0]
        rows = torch.stack(tokens, 1).tolist()
        chain = tuple(range(ROOT, shape.tokens - 1))
        return Proposal(
            tuple(map(tuple, rows)),
            (chain,) * len(rows),
            None if sampling.greedy else torch.stack(drawn_from, 1),
        )

    def _tree(self, shape: Tree) -> Proposal:
        grown = _Grown()
        expanded, logits = torch.full((1,), ROOT), self.root()[:, None]
        for level in range(shape.depth):
            grown.add(expanded, logits, shape.width)
            if level + 1 < shape.depth:
                expanded, tokens, parents = grown.expand(shape.width)
                logits = self.grow(tokens, parents)
        return grown.best(shape.nodes)


class _Grown:
    """Candidates of a tree for every row, in the order in which they were grown."""

    def __init__(self) -> None:
        self.tokens = torch.empty(0)
        self.parents = torch.empty(0)  # among candidates
        self.scores = torch.empty(0)  # log probability of the path
        self.fed = torch.empty(0)  # index among the nodes that the draft has computed
        self.fed_count = 0
        self.level_starts = 0

    def add(self, expanded: Tensor, logits: Tensor, width: int) -> None:
        """Children of the nodes that were expanded last: the `width` likeliest of each."""
        rows = len(logits)
        scores, tokens = logits.float().log_softmax(-1).topk(width, -1)  # [B, k, width]
        expanded = expanded.expand(rows, -1)
        if self.tokens.numel():
            scores = scores + self.scores.gather(1, expanded)[..., None]
        parents = expanded[..., None].expand_as(tokens)
        new = (tokens.flatten(1), parents.flatten(1), scores.flatten(1))
        self.level_starts = self.tokens.shape[1] if self.tokens.numel() else 0
        old = (self.tokens, self.parents, self.scores) if self.level_starts else (None,) * 3
        self.tokens, self.parents, self.scores = (
            b if a is None else torch.cat([a, b], 1) for a, b in zip(old, new, strict=True)
        )
        unfed = torch.full_like(new[0], ROOT)
        self.fed = unfed if old[0] is None else torch.cat([self.fed, unfed], 1)

    def expand(self, width: int) -> tuple[Tensor, Tensor, Tensor]:
        """The likeliest nodes of the last level, their tokens, and their parents as fed."""
        last = self.scores[:, self.level_starts :]
        chosen = last.topk(min(width, last.shape[1]), -1).indices + self.level_starts
        parents = self.parents.gather(1, chosen)
        fed = torch.where(parents == ROOT, ROOT, self.fed.gather(1, parents.clamp(min=0)))
        count = chosen.shape[1]
        places = torch.arange(self.fed_count, self.fed_count + count).expand_as(chosen)
        self.fed = self.fed.scatter(1, chosen, places)
        self.fed_count += count
        return chosen, self.tokens.gather(1, chosen), fed

    def best(self, nodes: int) -> Proposal:
        """The likeliest nodes; ties go to the earlier one, hence to the parent."""
        tokens, parents = [], []
        for row in range(len(self.tokens)):
            scores = self.scores[row].tolist()
            known = [i for i in range(len(scores)) if scores[i] > -torch.inf]
            kept = sorted(sorted(known, key=lambda i: (-scores[i], i))[:nodes])
            place = {ROOT: ROOT} | {old: new for new, old in enumerate(kept)}
            tokens.append(tuple(int(self.tokens[row, i]) for i in kept))
            parents.append(tuple(place[int(self.parents[row, i])] for i in kept))
        return Proposal(tuple(tokens), tuple(parents))


class ModelDraft(NetworkDraft):
    """A causal language model with the target's tokens as a draft.

    Args:
        model: with a cache of its own.
    """

    def __init__(self, model: CachedModel) -> None:
        self.model = model
        self.start(1)

    def start(self, rows: int) -> None:
        """A new batch begins."""
        self.model.start(rows)
        self._unfed: list[list[int]] = [[] for _ in range(rows)]
        self._drafted: list[list[int]] = []
        self._ancestry = torch.empty(0)

    def observe(self, committed: Committed) -> None:
        """Keep what was drafted and is right; the rest of the committed tokens is fed later."""
        kept = []
        for row, inputs in enumerate(committed.inputs):
            drafted = self._drafted[row] if self._drafted else []
            # The first input was fed as the root; a chain then agrees up to the first rejection.
            agreed = _agreement(drafted, inputs[1:]) if drafted else 0
            kept.append(range(agreed))
            fresh = inputs[1 + agreed :] if self._known(row) else inputs
            self._unfed[row] += [*fresh, committed.following[row]]
        self.model.commit(kept)
        self._drafted = []

    def _known(self, row: int) -> bool:
        return bool(self.model.lengths[row] > 0)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self.model.select(rows)
        self._unfed = [self._unfed[row] for row in rows]

    def root(self) -> Tensor:
        """Feed what was committed since; logits after the last token."""
        counts = torch.tensor([len(row) for row in self._unfed])
        ids = pad_sequence([torch.tensor(row) for row in self._unfed], batch_first=True)
        logits = self.model.forward(ids).logits
        self.model.commit([range(int(count)) for count in counts])
        rows = len(self._unfed)
        self._unfed = [[] for _ in range(rows)]
        self._drafted = [[] for _ in range(rows)]
        self._ancestry = torch.zeros(rows, 0, 0, dtype=torch.bool)
        return logits[torch.arange(rows), counts - 1].cpu()

    def grow(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits after new nodes."""
        visible = descend(self._ancestry, parents)
        depth = visible.sum(-1) - 1
        logits = self.model.forward(tokens, visible=visible, depth=depth).logits
        chain = visible.shape[1] == 1 and bool(visible.all())
        for row, drafted in enumerate(self._drafted):
            # Nodes of a tree are dropped at the next commit: only a chain is kept by prefix.
            drafted.extend(tokens[row].tolist() if chain else [])
        self._ancestry = extended(self._ancestry, visible)
        return logits.cpu()


def _agreement(drafted: Sequence[int], committed: Sequence[int]) -> int:
    """How many tokens agree from the start."""
    pairs = zip(drafted, committed, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(drafted), len(committed)))


def descend(ancestry: Tensor, parents: Tensor) -> Tensor:
    """Which provisional nodes new ones see: what the parent sees, and themselves.

    Args:
        ancestry: bool [B, m, m] of the m nodes there are.
        parents: int64 [B, k] among them, or `ROOT`.

    Returns:
        bool [B, k, m + k].
    """
    rows, count = parents.shape
    inherited = torch.zeros(rows, count, ancestry.shape[1], dtype=torch.bool)
    if ancestry.shape[1]:
        index = parents.clamp(min=0)[..., None].expand(-1, -1, ancestry.shape[2])
        inherited = ancestry.gather(1, index) & (parents != ROOT)[..., None]
    return torch.cat([inherited, torch.eye(count, dtype=torch.bool).expand(rows, -1, -1)], -1)


def extended(ancestry: Tensor, visible: Tensor) -> Tensor:
    """The square matrix of all nodes after new ones were added."""
    rows, old, _ = ancestry.shape
    padded = torch.cat([ancestry, torch.zeros(rows, old, visible.shape[1], dtype=torch.bool)], -1)
    return torch.cat([padded, visible], 1)
