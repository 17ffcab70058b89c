"""Acceptance, costs and speed of a draft on this machine, beside what needs no draft.

Speed-up = τ / (γ c + v): tokens per pass of the target over the time of a pass and of the γ steps
of the draft before it, in units of a plain step. Everything is measured in the same run, the ways
of decoding taking turns prompt by prompt, so that a busy machine is busy for all of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from compressor.decoding.assisted import Assisted
from compressor.decoding.cached import CachedModel
from compressor.decoding.clocks import Clocks
from compressor.decoding.decode import Decoded, Limits, decode, first_difference, margin
from compressor.decoding.early_exit import EarlyExitDraft, TrackedExitDraft
from compressor.decoding.proposals import Chain, Draft, ModelDraft, PromptLookup, Shape, Tree
from compressor.decoding.results import (
    Acceptance,
    DomainSpeed,
    DraftDomain,
    DraftMeasurement,
    DraftSpeed,
    ExitTrial,
)
from compressor.numerics.speculative import (
    Sampling,
    acceptance_length,
    accepted_by_position,
    best_drafted,
    speedup,
)
from compressor.progress import Observer

Prompts = Sequence[Sequence[int]]

_CONTEXT = 64  # tokens in the cache when a pass is timed
_ROUNDS = 7


@dataclass(frozen=True)
class Protocol:
    """What is measured.

    Attributes:
        drafted: largest γ.
        new_tokens: by which every prompt is continued; nothing ends a row earlier.
        tree: tried beside chains; None leaves it out.
        timed: prompts whose decoding is timed.
        seed: of sampling.
        batches: sizes at which speed is measured, 1 first.
    """

    drafted: int
    new_tokens: int
    tree: Tree | None
    timed: int
    seed: int
    batches: tuple[int, ...] = (1, 4)


@dataclass(frozen=True)
class _Costs:
    draft: float
    verify: tuple[float, ...]


def measure_draft(
    target: CachedModel,
    draft: Draft,
    untrained: Draft | None,
    prompts: Mapping[str, Prompts],
    protocol: Protocol,
    observer: Observer,
) -> DraftMeasurement:
    """Measure a draft.

    Args:
        target: returns the features that the draft reads.
        draft, untrained: after and before training; None for a draft that is never trained.
        prompts: by domain.
        protocol: what is measured.
        observer: progress.
    """
    return _Measuring(target, draft, untrained, None, prompts, protocol, observer).run()


def measure_early_exit(
    target: CachedModel,
    tracked: TrackedExitDraft,
    prompts: Mapping[str, Prompts],
    protocol: Protocol,
    observer: Observer,
) -> DraftMeasurement:
    """Try every candidate exit, and measure the best one and the choice before every pass.

    Args:
        target: returns no features.
        tracked: knows the candidates.
        prompts: by domain.
        protocol: what is measured.
        observer: progress.
    """
    drafts = {exit_: EarlyExitDraft(exit_) for exit_ in tracked.layers}
    with observer.task("try exits", len(drafts)) as task:
        trials = []
        for draft in drafts.values():
            one = _Measuring(target, draft, None, None, prompts, protocol, observer)
            trials.append(one.trial(draft.exit))
            task.advance()
    best = max(trials, key=lambda trial: trial.predicted).exit
    chosen = _Measuring(target, drafts[best], None, tracked, prompts, protocol, observer)
    return chosen.run().model_copy(update={"exit": best, "exits": tuple(trials)})


class _Measuring:
    def __init__(
        self,
        target: CachedModel,
        draft: Draft,
        untrained: Draft | None,
        tracked: Draft | None,
        prompts: Mapping[str, Prompts],
        protocol: Protocol,
        observer: Observer,
    ) -> None:
        self.target, self.draft, self.untrained, self.tracked = target, draft, untrained, tracked
        self.prompts, self.protocol, self.observer = prompts, protocol, observer
        self.chain = Chain(protocol.drafted)
        self.limits = Limits(protocol.new_tokens)
        self.everything = [prompt for rows in prompts.values() for prompt in rows]

    def run(self) -> DraftMeasurement:
        """Acceptance first, then costs, then wall-clock time at the best γ."""
        batches = self.protocol.batches
        with self.observer.task("measure draft", len(self.prompts) + 3 + len(batches)) as task:
            domains, blocks = {}, _Blocks()
            for name, rows in self.prompts.items():
                domains[name] = self._domain(rows, blocks)
                task.advance()
            untrained, tracked = map(self._overall, (self.untrained, self.tracked))
            task.advance()
            lookup = self._runs(PromptLookup(), self.chain, self.everything)
            task.advance()
            tree = self._tree_length()
            task.advance()
            greedy = _acceptance(blocks.greedy, self.protocol.drafted)
            speeds, compared = [], []
            for batch in batches:
                speed, pairs = self._speed(batch, greedy, domains)
                speeds.append(speed)
                compared += pairs
                task.advance()
        margins = self._margins(compared)
        return DraftMeasurement(
            domains=domains,
            greedy=greedy,
            sampled=_acceptance(blocks.sampled, self.protocol.drafted),
            untrained=untrained,
            tracked=tracked,
            lookup=_acceptance(lookup, self.protocol.drafted),
            tree_length=tree,
            speeds=tuple(speeds),
            prompts=len(compared),
            identical=len(compared) - len(margins),
            largest_margin=max(margins, default=0.0),
        )

    def trial(self, exit_: int) -> ExitTrial:
        """Acceptance and costs of an exit, and what they promise."""
        greedy = self._overall(self.draft)
        assert greedy is not None
        costs = self._costs([prompt for _, prompt in self._timed()[:1]])
        drafted, predicted = best_drafted(greedy.by_position, costs.draft, costs.verify)
        return ExitTrial(
            exit=exit_,
            length=acceptance_length(greedy.by_position[:drafted]),
            draft_cost=costs.draft,
            drafted=drafted,
            predicted=predicted,
        )

    # ------------------------------------------------------------------ acceptance

    def _domain(self, rows: Prompts, blocks: _Blocks) -> DraftDomain:
        greedy = self._runs(self.draft, self.chain, rows)
        sampled = self._runs(self.draft, self.chain, rows, Sampling(1.0))
        blocks.greedy += greedy
        blocks.sampled += sampled
        drafted = self.protocol.drafted
        return DraftDomain(
            greedy=_acceptance(greedy, drafted), sampled=_acceptance(sampled, drafted)
        )

    def _overall(self, draft: Draft | None) -> Acceptance | None:
        """Greedy, over all prompts; None without a draft."""
        if draft is None:
            return None
        return _acceptance(self._runs(draft, self.chain, self.everything), self.protocol.drafted)

    def _runs(
        self,
        draft: Draft,
        shape: Shape,
        rows: Prompts,
        sampling: Sampling = Sampling(),  # noqa: B008 — frozen
    ) -> list[tuple[int, int]]:
        """(proposed, accepted) of every block but those that a row's end cut short."""
        found = self._decode(rows, draft, shape, sampling)
        return [(block.proposed, block.accepted) for row in found.blocks for block in row[:-1]]

    def _decode(
        self,
        rows: Prompts,
        draft: Draft | None,
        shape: Shape,
        sampling: Sampling = Sampling(),  # noqa: B008 — frozen
    ) -> Decoded:
        target = self.target
        if draft is not None and draft.layers not in ((), target.layers):
            target = CachedModel(target.model, draft.layers)
        return decode(
            target, rows, self.limits, draft=draft, shape=shape, sampling=sampling,
            seed=self.protocol.seed,
        )  # fmt: skip

    def _tree_length(self) -> float | None:
        if self.protocol.tree is None:
            return None
        runs = self._runs(self.draft, self.protocol.tree, self.everything)
        return 1 + sum(accepted for _, accepted in runs) / max(1, len(runs))

    # ------------------------------------------------------------------ speed

    def _speed(
        self, batch: int, greedy: Acceptance, domains: Mapping[str, DraftDomain]
    ) -> tuple[DraftSpeed, list[tuple[Sequence[int], tuple[int, ...], tuple[int, ...]]]]:
        """Speed at a batch size, and what plain and speculative decoding gave for each prompt."""
        groups = _groups(self._timed(), batch)
        costs = self._costs([prompt for _, prompt in groups[0]])
        drafted, predicted = best_drafted(greedy.by_position, costs.draft, costs.verify)
        ways = self._ways(drafted, batch)
        clocks = Clocks()
        compared = []
        for group in groups:
            rows = [prompt for _, prompt in group]
            results = {}
            for name, way in ways.items():
                with clocks.running(name, group[0][0]):
                    results[name] = way(rows)
            pairs = zip(rows, results["plain"], results["measured"], strict=True)
            compared += list(pairs)
        tokens = sum(len(group) for group in groups) * self.protocol.new_tokens
        gains = clocks.gains()
        return DraftSpeed(
            batch=len(groups[0]),
            plain_tokens_per_second=tokens / clocks.seconds("plain"),
            draft_cost=costs.draft,
            verify_costs=costs.verify,
            drafted=drafted,
            predicted=predicted,
            domains=_by_domain(domains, clocks, costs, drafted) if batch == 1 else {},
            **gains,
        ), compared

    def _timed(self) -> list[tuple[str, Sequence[int]]]:
        """Prompts of all domains in turn, with their domains."""
        most = max(len(rows) for rows in self.prompts.values())
        turns = [
            (name, rows[i])
            for i in range(most)
            for name, rows in self.prompts.items()
            if i < len(rows)
        ]
        return turns[: self.protocol.timed]

    def _ways(
        self, drafted: int, batch: int
    ) -> dict[str, Callable[[Prompts], Sequence[tuple[int, ...]]]]:
        """Ways of decoding, by the name of their field; each gives the new tokens."""
        chain, tree = Chain(drafted), self.protocol.tree
        ways: dict[str, Callable[[Prompts], Sequence[tuple[int, ...]]]] = {
            "plain": lambda rows: self._decode(rows, None, chain).tokens,
            "measured": lambda rows: self._decode(rows, self.draft, chain).tokens,
            "lookup": lambda rows: self._decode(rows, PromptLookup(), self.chain).tokens,
        }
        if self.untrained is not None:
            ways["untrained"] = partial(self._tokens, self.untrained, chain)
        if self.tracked is not None:
            ways["tracked"] = partial(self._tokens, self.tracked, self.chain)
        if tree is not None:
            ways["tree"] = lambda rows: self._decode(rows, self.draft, tree).tokens
        if isinstance(self.draft, ModelDraft | EarlyExitDraft) and batch == 1:
            assisted = Assisted(self.target.model, self.draft, drafted, self.protocol.new_tokens)
            ways["assisted"] = lambda rows: [assisted(rows[0])]
        return ways

    def _tokens(self, draft: Draft, shape: Shape, rows: Prompts) -> Sequence[tuple[int, ...]]:
        return self._decode(rows, draft, shape).tokens

    def _costs(self, rows: Prompts) -> _Costs:
        """c from decoding itself, v from timed passes."""
        verify = self._pass_seconds(len(rows))
        plain, found = (self._decode(rows, way, self.chain) for way in (None, self.draft))
        step = plain.timing.verify / plain.timing.passes
        drafted = sum(block.proposed for block in max(found.blocks, key=len))
        return _Costs(
            found.timing.draft / drafted / step,
            tuple(seconds / verify[0] for seconds in verify[1:]),
        )

    @torch.inference_mode()
    def _pass_seconds(self, rows: int) -> list[float]:
        """Median time of a pass over 1 … γ + 1 tokens behind a short context."""
        target, most = self.target, self.protocol.drafted + 1
        target.start(rows)
        context = min(_CONTEXT, target.longest - most)
        ids = torch.arange(context + most) % target.vocab
        target.forward(ids[:context].expand(rows, -1))
        target.commit([range(context)] * rows)
        taken: list[list[float]] = [[] for _ in range(most)]
        for _ in range(_ROUNDS):
            for count in range(most):
                if count and isinstance(self.draft, EarlyExitDraft):
                    early = ids[context : context + count].expand(rows, -1)
                    target.leave_early(early, self.draft.exit)  # what drafting leaves behind
                began = time.perf_counter()
                found = target.forward(ids[context : context + count + 1].expand(rows, -1))
                found.logits[0, -1, 0].item()  # wait for an accelerator
                taken[count].append(time.perf_counter() - began)
                target.commit([[]] * rows)
        return [median(times) for times in taken]

    # ------------------------------------------------------------------ losslessness

    def _margins(
        self, compared: Sequence[tuple[Sequence[int], tuple[int, ...], tuple[int, ...]]]
    ) -> list[float]:
        """How near to a tie the target was wherever a draft changed the text."""
        found = []
        for prompt, plain, drafted in compared:
            place = first_difference(plain, drafted)
            if place is not None:
                found.append(margin(self.target, [*prompt, *plain[:place]]))
        return found


class _Blocks:
    """Blocks of all domains."""

    def __init__(self) -> None:
        self.greedy: list[tuple[int, int]] = []
        self.sampled: list[tuple[int, int]] = []


def _acceptance(runs: Sequence[tuple[int, int]], drafted: int) -> Acceptance:
    """τ counts every block, also those for which nothing was proposed."""
    return Acceptance(
        by_position=tuple(accepted_by_position(runs, drafted)),
        length=1 + sum(accepted for _, accepted in runs) / max(1, len(runs)),
        blocks=len(runs),
    )


def _groups(
    rows: Sequence[tuple[str, Sequence[int]]], batch: int
) -> list[Sequence[tuple[str, Sequence[int]]]]:
    """Full batches; a last one that is not full is left out unless it is the only one."""
    groups = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    return [group for group in groups if len(group) == batch] or groups[:1]


def _by_domain(
    domains: Mapping[str, DraftDomain], clocks: Clocks, costs: _Costs, drafted: int
) -> dict[str, DomainSpeed]:
    """Predicted from each domain's acceptance, and measured on its prompts."""
    verify = costs.verify[drafted - 1]
    found = {}
    for name in clocks.domains():
        length = acceptance_length(domains[name].greedy.by_position[:drafted])
        found[name] = DomainSpeed(
            predicted=speedup(length, drafted, costs.draft, verify),
            measured=clocks.seconds("plain", name) / clocks.seconds("measured", name),
        )
    return found
