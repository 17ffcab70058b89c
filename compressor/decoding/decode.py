"""Plain and speculative decoding, greedy or sampled, of one prompt or a batch.

The target sees every proposal of a block in one pass. What is emitted follows the target's own
distribution whatever the draft proposes; only the time depends on the draft.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from compressor.decoding.cached import CachedModel, Pass
from compressor.decoding.proposals import Chain, Committed, Draft, Proposal, Shape, descend
from compressor.errors import UsageError
from compressor.numerics.speculative import ROOT, Sampling, accept_chain, follow_tree, warp


@dataclass(frozen=True)
class Limits:
    """When a row is finished.

    Attributes:
        new_tokens: at most so many are emitted.
        stop: ids that end a row; the id itself is emitted.
    """

    new_tokens: int
    stop: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Block:
    """One pass of the target over one row's proposals.

    Attributes:
        proposed: depth of the proposal, tokens that could have been accepted.
        accepted: draft tokens that were emitted.
        emitted: these and, unless the row ended before it, the target's own token.
    """

    proposed: int
    accepted: int
    emitted: int


@dataclass
class Timing:
    """Where the seconds went; prompts apart, since both ways read them alike."""

    prompt: float = 0.0
    draft: float = 0.0
    verify: float = 0.0
    passes: int = 0


@dataclass(frozen=True)
class Decoded:
    """What was emitted for a batch.

    Attributes:
        tokens: by prompt, new tokens.
        blocks: by prompt, every pass that emitted something after the first token.
        timing: of the whole batch.
    """

    tokens: tuple[tuple[int, ...], ...]
    blocks: tuple[tuple[Block, ...], ...]
    timing: Timing

    @property
    def seconds(self) -> float:
        """Time of decoding without the prompts."""
        return self.timing.draft + self.timing.verify


@dataclass
class _Row:
    """A prompt on its way."""

    place: int
    tokens: list[int] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)
    finished: bool = False

    def emit(self, tokens: Sequence[int], limits: Limits) -> int:
        """Take over tokens until the row ends; how many were taken."""
        for count, token in enumerate(tokens, 1):
            self.tokens.append(token)
            if token in limits.stop or len(self.tokens) >= limits.new_tokens:
                self.finished = True
                return count
        return len(tokens)


def decode(
    target: CachedModel,
    prompts: Sequence[Sequence[int]],
    limits: Limits,
    *,
    draft: Draft | None = None,
    shape: Shape = Chain(4),  # noqa: B008 — frozen
    sampling: Sampling = Sampling(),  # noqa: B008 — frozen
    seed: int = 0,
) -> Decoded:
    """Continue prompts.

    Args:
        target: whose distribution is followed; it must return the features the draft reads.
        prompts: token ids; rows of one batch.
        limits: when a row ends. The target's longest context ends it too.
        draft: who proposes; None decodes plainly, one token a pass.
        shape: what is proposed before each pass.
        sampling: greedy by default.
        seed: of everything random.

    Raises:
        UsageError: a prompt is empty or fills the target's context, or the draft reads features
            that the target does not return.
    """
    return _Decoding(target, draft, shape, sampling, limits, seed).run(prompts)


class _Decoding:
    """One batch."""

    def __init__(
        self,
        target: CachedModel,
        draft: Draft | None,
        shape: Shape,
        sampling: Sampling,
        limits: Limits,
        seed: int,
    ) -> None:
        if draft is not None and draft.layers not in ((), target.layers):
            raise UsageError(
                f"the draft reads layers {list(draft.layers)} of its target, which returns "
                f"{list(target.layers)}"
            )
        if draft is not None:
            draft.attach(target)
        self.target, self.draft, self.shape = target, draft, shape
        self.sampling, self.limits = sampling, limits
        self.generator = torch.Generator().manual_seed(seed)
        self.timing = Timing()

    def run(self, prompts: Sequence[Sequence[int]]) -> Decoded:
        """Decode until every row is finished."""
        _check(prompts, self.target)
        rows = [_Row(place) for place in range(len(prompts))]
        self.rows = list(rows)
        with torch.inference_mode():
            self._read(prompts)
            self._drop_finished()
            while self.rows:
                self._block()
                self._drop_finished()
        return Decoded(
            tuple(tuple(row.tokens) for row in rows),
            tuple(tuple(row.blocks) for row in rows),
            self.timing,
        )

    def _read(self, prompts: Sequence[Sequence[int]]) -> None:
        """The prompts in one pass, and the first token of every row."""
        began = time.perf_counter()
        self.target.start(len(prompts))
        if self.draft is not None:
            self.draft.start(len(prompts))
        ids = pad_sequence([torch.tensor(list(prompt)) for prompt in prompts], batch_first=True)
        last = torch.tensor([len(prompt) - 1 for prompt in prompts])
        ends, place = torch.unique(last, return_inverse=True)
        result = self.target.forward(ids, places=ends)
        self.target.commit([range(len(prompt)) for prompt in prompts])
        chances = warp(result.logits[torch.arange(len(prompts)), place].cpu(), self.sampling)
        first = [follow_tree(row[None], (), (), self.generator)[1] for row in chances]
        for row, token in zip(self.rows, first, strict=True):
            row.emit([token], self.limits)
        self._tell([tuple(prompt) for prompt in prompts], result, first)
        self.last = first
        self.timing.prompt += time.perf_counter() - began

    def _block(self) -> None:
        """Propose, verify, commit."""
        began = time.perf_counter()
        proposal = self._propose()
        proposed = time.perf_counter()
        self.timing.draft += proposed - began
        result, probabilities = self._verify(proposal)
        kept, inputs, following = [], [], []
        for place, row in enumerate(self.rows):
            path, token = self._judge(proposal, probabilities[place], place)
            drafted = [proposal.tokens[place][node] for node in path]
            emitted = row.emit([*drafted, token], self.limits)
            depth = max(_depths(proposal.parents[place]), default=0)
            row.blocks.append(Block(depth, min(len(path), emitted), emitted))
            kept.append([0, *(1 + node for node in path)])
            inputs.append((self.last[place], *drafted))
            following.append(token)
        self.target.commit(kept)
        self._tell(inputs, result, following, kept)
        self.last = following
        self.timing.verify += time.perf_counter() - proposed
        self.timing.passes += 1

    def _propose(self) -> Proposal:
        depth = min(self.shape.depth, self.target.room - 1)
        if self.draft is None or depth < 1:
            nothing: tuple[tuple[int, ...], ...] = ((),) * len(self.rows)
            return Proposal(nothing, nothing)
        return self.draft.propose(self.shape.shallower(depth), self.sampling, self.generator)

    def _verify(self, proposal: Proposal) -> tuple[Pass, Tensor]:
        """One pass over the last token and all proposals; p at each of them, [B, 1+n, V]."""
        nodes = [torch.tensor(row, dtype=torch.int64) for row in proposal.tokens]
        ids = torch.cat([torch.tensor(self.last)[:, None], pad_sequence(nodes, True)], 1)
        if all(row == tuple(range(ROOT, len(row) - 1)) for row in proposal.parents):
            result = self.target.forward(ids)
        else:
            visible = _visible(proposal.parents, ids.shape[1])
            result = self.target.forward(ids, visible=visible, depth=visible.sum(-1) - 1)
        return result, warp(result.logits.cpu(), self.sampling)

    def _judge(self, proposal: Proposal, target: Tensor, place: int) -> tuple[list[int], int]:
        """The accepted nodes of a row and the token after them."""
        tokens, parents = proposal.tokens[place], proposal.parents[place]
        if proposal.probabilities is None:
            return follow_tree(target, tokens, parents, self.generator)
        drafted = proposal.probabilities[place]
        accepted, token = accept_chain(target, drafted, torch.tensor(tokens), self.generator)
        return list(range(accepted)), token

    def _tell(
        self,
        inputs: Sequence[tuple[int, ...]],
        result: Pass,
        following: Sequence[int],
        kept: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Show the draft what was committed."""
        if self.draft is None:
            return
        features = None
        if result.features is not None:
            places = kept or [range(len(row)) for row in inputs]
            features = tuple(
                result.features[row, list(chosen)] for row, chosen in enumerate(places)
            )
        self.draft.observe(Committed(tuple(inputs), features, tuple(following)))

    def _drop_finished(self) -> None:
        """Rows that are finished, or out of room, leave the batch."""
        full = self.target.lengths >= self.target.longest
        going = [
            place for place, row in enumerate(self.rows) if not row.finished and not full[place]
        ]
        if len(going) == len(self.rows):
            return
        self.rows = [self.rows[place] for place in going]
        self.last = [self.last[place] for place in going]
        if going:
            self.target.select(going)
            if self.draft is not None:
                self.draft.select(going)


def _check(prompts: Sequence[Sequence[int]], target: CachedModel) -> None:
    for place, prompt in enumerate(prompts):
        if not 0 < len(prompt) < target.longest:
            raise UsageError(
                f"prompt {place} has {len(prompt)} tokens; the target takes 1 to "
                f"{target.longest - 1} and room for one more"
            )


def _depths(parents: Sequence[int]) -> list[int]:
    """Distance of every node from the last committed token."""
    depths: list[int] = []
    for parent in parents:
        depths.append(1 if parent == ROOT else depths[parent] + 1)
    return depths


def _visible(parents: Sequence[Sequence[int]], length: int) -> Tensor:
    """What the last token and every node behind it see, bool [B, length, length].

    Padding sees the last token only, so that no row of the mask is empty.
    """
    rows = len(parents)
    visible = torch.ones(rows, 1, 1, dtype=torch.bool)
    for node in range(length - 1):
        own = [row[node] + 1 if node < len(row) else 0 for row in parents]
        added = descend(visible, torch.tensor(own)[:, None])
        above = torch.zeros(rows, visible.shape[1], 1, dtype=torch.bool)
        visible = torch.cat([torch.cat([visible, above], 2), added], 1)
    return visible


def first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    """First place where two continuations differ, or None where one begins the other."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), None)


def margin(target: CachedModel, tokens: Sequence[int]) -> float:
    """Difference between the two largest logits after these tokens: how near to a tie.

    Args:
        target: a model.
        tokens: prompt and everything emitted before the place in question.
    """
    target.start(1)
    logits = target.forward(torch.tensor([list(tokens)])).logits[0, -1]
    top = logits.float().topk(2).values
    return float(top[0] - top[1])
