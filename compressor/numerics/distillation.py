"""Losses that pull a student's next-token distribution q towards a teacher's p.

Every function takes the student's logits z (q = softmax z) and gives one number per position.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

from compressor.numerics.recovery import cached_parts

Loss = Literal["kl", "tv", "ce", "lk_hybrid"]
Total = Callable[[Tensor], Tensor]
"""Sum of a tensor over all processes that train together."""

HYBRID_RATE = 3.0  # η of LK-λ; its authors take 10 for weak heads
ROWS = 64  # positions at once: a few MB, which stay in the cache while they are worked on


def _alone(tensor: Tensor) -> Tensor:
    """The `Total` of one process."""
    return tensor


def divergence(
    kind: Loss,
    logits: Tensor,
    teacher: Tensor,
    mask: Tensor,
    top: int | None = None,
    *,
    total: Total = _alone,
) -> Tensor:
    """Mean loss over the positions that count; 0 without any. Few logits are worked on at a time.

    Of processes that train together each has some of the positions: what it gets is its part of
    the sum, divided by the positions of all.

    Args:
        kind: `kl`: Σ p log(p/q); `tv`: 1 - Σ min(p, q), one minus the probability of acceptance;
            `ce`: -log q(argmax p); `lk_hybrid`: λ kl + (1 - λ) tv with λ = exp(-η α), α the mean
            acceptance over these positions, taken as a constant (LK losses, reported for MLP,
            Medusa and EAGLE-3 drafts): KL while the draft is poor, where the gradient of TV
            vanishes, and the acceptance itself once it is good.
        logits: z, [..., V].
        teacher: p, [..., V].
        mask: bool [...].
        top: keep only so many of the teacher's likeliest tokens, renormalised (HASS, Zhang et al.
            2024, arXiv:2408.15766); None keeps all.
        total: sums over processes; called as often by each, whatever it has.
    """
    rows = (tensor.flatten(0, -2) for tensor in (logits, truncated(teacher, top)))
    found: Tensor = _Compared.apply(*rows, mask.flatten(), kind, total)  # type: ignore[no-untyped-call]
    return found


def forward_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(p || q) [...], nats; its gradient in z is q - p."""
    return functional.kl_div(logits.float().log_softmax(-1), teacher.float(), reduction="none").sum(
        -1
    )


def truncated(teacher: Tensor, top: int | None) -> Tensor:
    """The `top` likeliest tokens of p [..., V], renormalised; all of them without `top`."""
    if top is None:
        return teacher
    kept = teacher.topk(min(top, teacher.shape[-1]), -1)
    part = torch.zeros_like(teacher).scatter_(-1, kept.indices, kept.values)
    return part / part.sum(-1, keepdim=True)


def teach(
    states: Tensor,
    weight: Tensor,
    teacher: Tensor,
    places: Tensor,
    mask: Tensor,
    kind: Loss,
    *,
    total: Total = _alone,
) -> Tensor:
    """`divergence` of the logits states @ weightᵀ, without ever holding all of them.

    A few positions at a time go from states to loss while they are in the processor's cache; of
    each, q is kept for the gradient. Products and q are in the precision of the teacher. Positions
    that do not count are computed too, so that shapes do not depend on them: libraries build a
    kernel for every new shape.

    Args:
        states: what the student's head reads, [N, H].
        weight: of the student's head, [V, H].
        teacher: p, [M, V].
        places: which of its rows belongs to each state, int64 [N].
        mask: bool [N], which positions count.
        kind, total: as for `divergence`.
    """
    inputs = states.to(teacher.dtype), weight.to(teacher.dtype)
    found: Tensor = _Taught.apply(*inputs, teacher, places, mask, kind, total)  # type: ignore[no-untyped-call]
    return found


class _Taught(torch.autograd.Function):
    """A head's product and its loss together."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        teacher: Tensor,
        places: Tensor,
        mask: Tensor,
        kind: Loss,
        total: Total,
    ) -> Tensor:
        """The loss, fp32 scalar; arguments as of `teach`. Keeps q [N, V]."""
        ctx.kind, kept = kind, states.new_empty(len(states), len(weight))
        parts = (slice(start, start + ROWS) for start in range(0, len(states), ROWS))
        pairs = ((part, states[part] @ weight.T, teacher[places[part]]) for part in parts)
        loss, ctx.terms, shares = _summed(kind, pairs, mask, kept, total)
        ctx.save_for_backward(states, weight, teacher, places, shares, kept)
        return states.new_tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states [N, H] and head [V, H]; nothing else has any."""
        states, weight, teacher, places, shares, kept = ctx.saved_tensors
        of_logits = torch.empty_like(kept)
        for start in range(0, len(states), ROWS):
            part = slice(start, start + ROWS)
            p, factor = teacher[places[part]], above[0] * shares[part]
            of_logits[part] = _slope(ctx.kind, ctx.terms, p, kept[part], factor)
        return of_logits @ weight, of_logits.T @ states, *[None] * 5


class _Compared(torch.autograd.Function):
    """The loss of logits that are there already."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, teacher: Tensor, mask: Tensor, kind: Loss, total: Total
    ) -> Tensor:
        """The loss, fp32 scalar; arguments as of `divergence`. Keeps q [N, V]."""
        ctx.kind, kept = kind, torch.empty_like(logits)
        pairs = ((part, logits[part], teacher[part]) for part in cached_parts(logits))
        loss, ctx.terms, shares = _summed(kind, pairs, mask, kept, total)
        ctx.save_for_backward(teacher, shares, kept)
        return logits.new_tensor(loss, dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the logits [N, V]."""
        teacher, shares, kept = ctx.saved_tensors
        of_logits = torch.empty_like(kept)
        for part in cached_parts(kept):
            factor = above[0] * shares[part]
            of_logits[part] = _slope(ctx.kind, ctx.terms, teacher[part], kept[part], factor)
        return of_logits, *[None] * 4


def _summed(
    kind: Loss,
    pairs: Iterable[tuple[slice, Tensor, Tensor]],
    mask: Tensor,
    kept: Tensor,
    total: Total,
) -> tuple[float, tuple[float, float], Tensor]:
    """The loss, the factors of KL and TV in it, and the weight of every position, fp32 [N].

    Args:
        kind: of the loss.
        pairs: z and p of some positions, a part after the other.
        mask: bool [N], which positions count.
        kept: gets q, [N, V].
        total: sums over processes.
    """
    sums = torch.zeros(3, dtype=torch.float64, device=kept.device)
    for part, logits, teacher in pairs:
        p, log_q = _wanted(teacher, kind), logits.float().log_softmax(-1)
        q = log_q.exp()
        kept[part] = q
        kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
        variation = 1 - torch.minimum(p, q).sum(-1)
        found = torch.stack([kl, variation, torch.ones_like(kl)])
        sums += found[:, mask[part]].sum(-1)
    whole = total(sums.clone())  # of all processes
    count = whole[2].clamp(min=1)
    kl, variation, everywhere = torch.stack([sums[0], sums[1], whole[1]]).div(count).tolist()
    mixed = math.exp(-HYBRID_RATE * (1 - everywhere))
    terms = {
        "kl": (1.0, 0.0),
        "ce": (1.0, 0.0),  # the divergence from one token, which has no entropy
        "tv": (0.0, 1.0),
        "lk_hybrid": (mixed, 1 - mixed),
    }[kind]
    return terms[0] * kl + terms[1] * variation, terms, (mask / count).float()


def _slope(
    kind: Loss, terms: tuple[float, float], teacher: Tensor, kept: Tensor, factor: Tensor
) -> Tensor:
    """∂KL/∂z = q - p, and ∂TV/∂z = q (m·q - m) where m = 1[q < p]; fp32 [n, V].

    Args:
        kind: of the loss.
        terms: factors of KL and TV.
        teacher: p, [n, V].
        kept: q, [n, V].
        factor: of every position, [n].
    """
    p, q = _wanted(teacher, kind), kept.float()
    found = terms[0] * (q - p)
    if terms[1]:
        below = q * (q < p)
        found += terms[1] * (q * below.sum(-1, keepdim=True) - below)
    return found.mul_(factor[:, None])


def _wanted(teacher: Tensor, kind: Loss) -> Tensor:
    """p, or all of it on its likeliest token, fp32."""
    p = teacher.float()
    if kind == "ce":
        return functional.one_hot(p.argmax(-1), p.shape[-1]).float()
    return p
