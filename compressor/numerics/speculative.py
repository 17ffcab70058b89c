"""Speculative decoding as arithmetic: who is accepted, and what it is worth.

A draft proposes tokens from its distributions q; the target computes its own distributions p for
all of them in one pass. The rules below emit tokens distributed exactly as if drawn from p alone
(Leviathan et al. 2022, arXiv:2211.17192, algorithm 1; Chen et al. 2023, arXiv:2302.01318).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from compressor.errors import NumericalError

ROOT = -1  # parent of a node that follows the last committed token


@dataclass(frozen=True)
class Sampling:
    """How logits become the distribution that is sampled; the same on both sides.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: keep only so many of the most likely tokens; None keeps all.
        top_p: keep the smallest set of most likely tokens with at least this probability.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0


def warp(logits: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [..., V] in fp32 or better that sampling draws from.

    Greedy decoding is the distribution with all mass on the first largest logit, so that one rule
    of acceptance serves both. Order as in transformers: temperature, top-k, top-p.

    Args:
        logits: [..., V].
        sampling: temperature and cuts.
    """
    if sampling.greedy:
        best = logits.argmax(-1, keepdim=True)
        one_hot = torch.zeros_like(logits, dtype=torch.float32)
        return one_hot.scatter_(-1, best, 1.0)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)) / sampling.temperature
    if sampling.top_k is not None and sampling.top_k < scores.shape[-1]:
        least = scores.topk(sampling.top_k, -1).values[..., -1:]
        scores = scores.masked_fill(scores < least, -torch.inf)
    probabilities = scores.softmax(-1)
    return _nucleus(probabilities, sampling.top_p) if sampling.top_p < 1 else probabilities


def _nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """The most likely tokens until their mass reaches `top_p`, renormalised."""
    ordered, order = probabilities.sort(-1, descending=True)
    before = ordered.cumsum(-1) - ordered
    ordered = ordered.masked_fill(before >= top_p, 0.0)
    kept = torch.zeros_like(probabilities).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)


def sample(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """One index for each distribution [..., V] -> int64 [...].

    By inversion: one random number for a distribution, where `torch.multinomial` draws one for
    every token of the vocabulary.

    Raises:
        NumericalError: a distribution holds a NaN, or no mass.
    """
    reached = probabilities.cumsum(-1, dtype=torch.float64)
    mass = reached[..., -1:]
    if not bool((mass > 0).all()):
        raise NumericalError("a distribution to sample from has no mass or holds a NaN")
    chance = torch.rand(mass.shape, dtype=mass.dtype, generator=generator)
    # Rounding must not lift the place to the mass itself, behind which there is no token.
    place = torch.minimum(chance.to(mass.device) * mass, mass.nextafter(torch.zeros_like(mass)))
    return torch.searchsorted(reached, place, right=True)[..., 0]


def residual(target: Tensor, draft: Tensor) -> Tensor:
    """What is drawn from after a rejection: (p - q)+ normalised; p itself where q covers p."""
    rest = (target - draft).clamp(min=0)
    mass = rest.sum(-1, keepdim=True)
    return torch.where(mass > 0, rest / mass, target)


def overlap(target: Tensor, draft: Tensor) -> Tensor:
    """Probability that one token of the draft is accepted, Σ min(p, q) = 1 - TV(p, q)."""
    return torch.minimum(target, draft).sum(-1)


def accept_chain(
    target: Tensor, draft: Tensor, tokens: Tensor, generator: torch.Generator | None
) -> tuple[int, int]:
    """Test the tokens of a chain one after the other.

    Token i is accepted with probability min(1, p_i / q_i); the first rejected one is replaced by
    a draw from the residual, and a chain accepted to its end is followed by a draw from p.

    Args:
        target: p, [γ+1, V]; row i is the distribution of the token at place i.
        draft: q, [γ, V], from which `tokens` were drawn.
        tokens: int64 [γ].
        generator: source of randomness.

    Returns:
        How many tokens were accepted, and the token that follows them.
    """
    chances = torch.rand(len(tokens), generator=generator, dtype=target.dtype)
    for place, token in enumerate(tokens.tolist()):
        p, q = float(target[place, token]), float(draft[place, token])
        if not float(chances[place]) * q < p:
            rest = residual(target[place], draft[place])
            return place, int(sample(rest, generator))
    return len(tokens), int(sample(target[len(tokens)], generator))


def follow_tree(
    target: Tensor, tokens: Sequence[int], parents: Sequence[int], generator: torch.Generator | None
) -> tuple[list[int], int]:
    """Walk a tree whose nodes were chosen without chance: draw from p, follow while it is there.

    What is emitted are draws from p, so this is lossless whatever the tree holds; with a
    proposal that is certain (q one-hot) the rule of `accept_chain` comes to the same.

    Args:
        target: p, [n+1, V]; row 0 follows the committed tokens, row 1 + i follows node i.
        tokens: of the n nodes.
        parents: index of the node before; `ROOT` for those that follow the committed tokens.
        generator: source of randomness.

    Returns:
        The accepted nodes from the root down, and the token that follows them.
    """
    children = {(parent, token): i for i, (parent, token) in enumerate(zip(parents, tokens))}  # noqa: B905
    path: list[int] = []
    at = ROOT
    while True:
        token = int(sample(target[at + 1], generator))
        found = children.get((at, token))
        if found is None:
            return path, token
        path.append(found)
        at = found


def acceptance_length(by_position: Sequence[float]) -> float:
    """τ = 1 + Σ a_j: tokens per pass of the target, the bonus token included.

    Args:
        by_position: a_j, the probability that the first j draft tokens are all accepted.
    """
    return 1.0 + sum(by_position)


def expected_length(acceptance: float, drafted: int) -> float:
    """τ when every token is accepted alike and independently: (1 - α^(γ+1)) / (1 - α)."""
    return sum(acceptance**power for power in range(drafted + 1))


def speedup(length: float, drafted: int, draft_cost: float, verify_cost: float) -> float:
    """How many times faster than plain decoding: τ / (γ c + v).

    Args:
        length: τ at this γ.
        drafted: γ, steps of the draft before each pass of the target.
        draft_cost: c, seconds of one step of the draft / of one plain step of the target.
        verify_cost: v, seconds of a pass over γ + 1 tokens / of one plain step.
    """
    return length / (drafted * draft_cost + verify_cost)


def best_drafted(
    by_position: Sequence[float], draft_cost: float, verify_costs: Sequence[float]
) -> tuple[int, float]:
    """The γ ≥ 1 of the largest predicted speed-up, and that speed-up.

    Args:
        by_position: a_1 … a_n.
        draft_cost: c.
        verify_costs: v for γ = 1 … n.

    Raises:
        NumericalError: the two lists differ in length or are empty.
    """
    if not by_position or len(by_position) != len(verify_costs):
        raise NumericalError("one verify cost belongs to every position, and at least one")
    predicted = [
        speedup(acceptance_length(by_position[:drafted]), drafted, draft_cost, cost)
        for drafted, cost in enumerate(verify_costs, 1)
    ]
    best = max(range(len(predicted)), key=predicted.__getitem__)
    return best + 1, predicted[best]


def accepted_by_position(runs: Sequence[tuple[int, int]], drafted: int) -> list[float]:
    """a_1 … a_γ from whole blocks: the share in which the first j tokens were all accepted.

    Products of marginals are another thing, since acceptance differs from block to block. A block
    that proposed fewer than j tokens says nothing about j and is left out there.

    Args:
        runs: (proposed, accepted) of every block.
        drafted: γ.
    """
    shares = []
    for position in range(1, drafted + 1):
        asked = [accepted for proposed, accepted in runs if proposed >= position]
        passed = sum(accepted >= position for accepted in asked)
        shares.append(passed / len(asked) if asked else 0.0)
    return shares


GOOD_COST = 0.05  # c of an EAGLE-3 head with a trimmed vocabulary
GOOD_RATE = 0.8  # α of a well-trained one
GOOD_VERIFY = 1.0  # v where a pass is bound by reading the weights


@dataclass(frozen=True)
class Limit:
    """Why a draft gains no more: which term, made good by itself, would help most.

    Attributes:
        term: `draft cost` (c), `verify cost` (v) or `acceptance` (τ).
        better_cost, better_verify, better_acceptance: the best predicted speed-up over γ if only
            c, only v or only the acceptance were what good drafts and idle machines have.
    """

    term: Literal["draft cost", "verify cost", "acceptance"]
    better_cost: float
    better_verify: float
    better_acceptance: float


def limiting_term(
    by_position: Sequence[float], draft_cost: float, verify_costs: Sequence[float]
) -> Limit:
    """Replace one term of τ / (γ c + v) at a time by a good value; a better one is kept.

    Args:
        by_position: a_1 … a_n.
        draft_cost: c.
        verify_costs: v for γ = 1 … n.
    """
    good = [
        max(share, GOOD_RATE**place) for place, share in enumerate(by_position, 1)
    ]  # a_j of independent tokens is α^j
    cheap = [min(cost, GOOD_VERIFY) for cost in verify_costs]
    gains = (
        best_drafted(by_position, min(draft_cost, GOOD_COST), verify_costs)[1],
        best_drafted(by_position, draft_cost, cheap)[1],
        best_drafted(good, draft_cost, verify_costs)[1],
    )
    terms: tuple[Literal["draft cost", "verify cost", "acceptance"], ...] = (
        "draft cost", "verify cost", "acceptance",
    )  # fmt: skip
    return Limit(terms[gains.index(max(gains))], *gains)


def paying_scale(
    by_position: Sequence[float], draft_cost: float, verify_costs: Sequence[float], wanted: float
) -> float | None:
    """How many times as large a target must be for the same draft to pay.

    A larger target makes c smaller in proportion; acceptance and v are taken as they are. From
    τ / (γ c / s + v) = wanted, s = γ c / (τ / wanted - v), the smallest over γ. None if no size
    would do, since v alone costs more than is accepted.

    Args:
        by_position: a_1 … a_n.
        draft_cost: c.
        verify_costs: v for γ = 1 … n.
        wanted: speed-up.
    """
    found = []
    for drafted, verify in enumerate(verify_costs, 1):
        rest = acceptance_length(by_position[:drafted]) / wanted - verify
        if rest > 0:
            found.append(drafted * draft_cost / rest)
    return min(found, default=None)


def products_share(verify_costs: Sequence[float]) -> float:
    """The share s of a plain step that goes into products, from measured verification.

    With passes as in `predicted_costs`, v(γ) = 1 + s γ; s by least squares over γ.

    Args:
        verify_costs: v for γ = 1 … n.
    """
    above = sum(drafted * (cost - 1) for drafted, cost in enumerate(verify_costs, 1))
    return above / sum(drafted**2 for drafted in range(1, len(verify_costs) + 1))


def predicted_costs(
    target: float, draft: float, drafted: int, products: float
) -> tuple[float, tuple[float, ...]]:
    """c and v(1 … γ) by the weights that draft and target read: a model, not a measurement.

    A pass of n tokens over w weights takes w (b / B + 2 n / F): reading them, b bytes each at B
    bytes a second, and then multiplying, at F operations a second for few tokens. So c is the
    ratio of the weights, and v(γ) = 1 + s γ with s = (2 / F) / (b / B + 2 / F) for every target.
    Attention to what stands in the cache, norms and the starting of kernels are left out; they
    weigh most where models are small and machines fast.

    Args:
        target: weights that a pass reads: all matrices of its blocks and the head.
        draft: weights that a step of the draft reads, in the same precision.
        drafted: γ, the most.
        products: s, as from `products_share`; 0 where multiplying costs nothing.
    """
    return draft / target, tuple(1 + products * count for count in range(1, drafted + 1))
