"""The target as its own draft: it guesses after some of its blocks and verifies with the rest.

No second model and no second cache: drafted tokens stand in the target's cache of the first blocks,
and the pass that verifies them computes the other blocks only (LayerSkip, Elhoushi et al. 2024,
arXiv:2404.16710). What is emitted is the target's own either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Head
from compressor.decoding.proposals import (
    Chain,
    Committed,
    NetworkDraft,
    Proposal,
    Shape,
    Tree,
    descend,
    extended,
)
from compressor.errors import ModelError
from compressor.model.architecture import Architecture
from compressor.numerics.exits import TrackedRates, best_exit, exit_cost
from compressor.numerics.speculative import Sampling


class EarlyExitDraft(NetworkDraft):
    """Guesses with the first blocks of its target, always as many.

    Args:
        exit_: blocks that a guess takes.
    """

    def __init__(self, exit_: int) -> None:
        self.exit = exit_

    def attach(self, target: CachedModel) -> None:
        """Guess with the blocks of this model."""
        if not 0 < self.exit < len(target.blocks):
            raise ModelError(f"no exit after block {self.exit} of {len(target.blocks)}")
        self.target = target

    def start(self, rows: int) -> None:
        """A new batch begins."""
        self._last = [0] * rows

    def observe(self, committed: Committed) -> None:
        """Remember the last token; everything else is in the target's cache."""
        self._last = list(committed.following)

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        self._last = [self._last[row] for row in rows]

    def propose(
        self, shape: Shape, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """A chain, on which the target goes on, or a tree, which it computes anew."""
        found = super().propose(shape, sampling, generator)
        if isinstance(shape, Tree):
            self.target.forget()
        return found

    def root(self) -> Tensor:
        """Read the last token; logits after it."""
        rows = len(self._last)
        self._ancestry = torch.ones(rows, 1, 1, dtype=torch.bool)
        return self.target.leave_early(torch.tensor(self._last)[:, None], self.exit)[:, 0].cpu()

    def grow(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Logits after new nodes; the last committed token stands before them, at 0."""
        visible = descend(self._ancestry, parents + 1)
        self._ancestry = extended(self._ancestry, visible)
        if bool(visible.all()):
            return self.target.leave_early(tokens, self.exit).cpu()
        return self.target.leave_early(
            tokens, self.exit, visible=visible, depth=visible.sum(-1) - 1
        ).cpu()


class TrackedExitDraft(EarlyExitDraft):
    """Chooses exit and length before every pass by how often each exit was right lately.

    With nothing to gain it proposes nothing. Guesses of the exits that were not used cost a pass
    of the head over the tokens that were just committed.

    Args:
        exits: candidates, ascending.
        rates: α of each, known before the text begins.
    """

    def __init__(self, exits: tuple[int, ...], rates: tuple[float, ...]) -> None:
        super().__init__(exits[0])
        self.layers = exits
        self.known = rates

    def attach(self, target: CachedModel) -> None:
        """Guess with the blocks of this model."""
        super().attach(target)
        self._costs = list(costs_of(target.model, self.layers).values())

    def start(self, rows: int) -> None:
        """A new batch begins."""
        super().start(rows)
        self._tracked = TrackedRates(self.known, rows)
        self._begun = False

    def observe(self, committed: Committed) -> None:
        """What every exit would have guessed where the target has just spoken.

        The prompt is left out: the target did not write it.
        """
        super().observe(committed)
        if self._begun:
            assert committed.features is not None
            for row, (inputs, following) in enumerate(
                zip(committed.inputs, committed.following, strict=True)
            ):
                states = committed.features[row].view(len(inputs), len(self.layers), -1)
                said = torch.tensor([*inputs[1:], following])
                guessed = guesses(self.target.model, states).cpu()
                self._tracked.see(row, guessed == said[:, None])
        self._begun = True

    def select(self, rows: Sequence[int]) -> None:
        """Go on with some of the rows."""
        super().select(rows)
        self._tracked.select(rows)

    def propose(
        self, shape: Shape, sampling: Sampling, generator: torch.Generator | None
    ) -> Proposal:
        """A chain of the best length from the best exit, at most as long as asked for."""
        best = best_exit(self._tracked.rates, self._costs, [1.0] * shape.depth)
        if not best.drafted:
            nothing: tuple[tuple[int, ...], ...] = ((),) * len(self._last)
            return Proposal(nothing, nothing)
        self.exit = self.layers[best.place]
        return super().propose(Chain(best.drafted), sampling, generator)


def costs_of(model: Any, exits: Sequence[int]) -> dict[int, float]:
    """c of every exit, by the weights that a step reads.

    Args:
        model: a causal language model.
        exits: after so many blocks.
    """
    sizes = Architecture.from_config(model.config.get_text_config().to_dict())
    block = sum(matrix.parameters for matrix in sizes.block(0))
    head = sizes.hidden * sizes.vocab
    return {exit_: exit_cost(exit_, sizes.layers, block, head) for exit_ in exits}


def guesses(model: Any, states: Tensor) -> Tensor:
    """The likeliest next tokens if the model ended here, int64 [n, exits].

    Args:
        model: a causal language model; its last norm and head are used.
        states: what its blocks left, [n, exits, H].
    """
    sizes = Architecture.from_config(model.config.get_text_config().to_dict())
    norm = model.get_submodule(sizes.final_norm.removesuffix(".weight"))
    return Head.of(model).logits(norm(states).float()).argmax(-1)
