"""Losses that pull a student's next-token distribution q towards a teacher's p.

Every function takes the student's logits z (q = softmax z) and gives one number per position.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

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
    """Mean loss over the positions that count; 0 without any.

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
    logits, teacher = logits[mask], truncated(teacher[mask], top)
    count = total(mask.sum()).clamp(min=1)
    if kind == "ce":
        aim = teacher.argmax(-1)
        return functional.cross_entropy(logits.float(), aim, reduction="sum") / count
    if kind == "kl":
        return forward_kl(logits, teacher).sum() / count
    variation = total_variation(logits, teacher).sum() / count
    if kind == "tv":
        return variation
    share = torch.exp(-HYBRID_RATE * (1 - total(variation.detach().clone())))
    return share * forward_kl(logits, teacher).sum() / count + (1 - share) * variation


def forward_kl(logits: Tensor, teacher: Tensor) -> Tensor:
    """KL(p || q) [...], nats; its gradient in z is q - p."""
    return functional.kl_div(logits.float().log_softmax(-1), teacher.float(), reduction="none").sum(
        -1
    )


def total_variation(logits: Tensor, teacher: Tensor) -> Tensor:
    """TV(p, q) [...] = 1 - Σ min(p, q)."""
    return 1 - torch.minimum(logits.float().softmax(-1), teacher.float()).sum(-1)


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
    """With z = W h: ∂KL/∂z = q - p, and ∂TV/∂z = q (m·q - m) where m = 1[q < p]."""

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
        kept = torch.empty(len(states), len(weight), dtype=states.dtype, device=states.device)
        sums = torch.zeros(3, dtype=torch.float64, device=states.device)
        for rows in range(0, len(states), ROWS):
            part = slice(rows, rows + ROWS)
            p, logits = _wanted(teacher[places[part]], kind), (states[part] @ weight.T).float()
            log_q = logits.log_softmax(-1)
            q = log_q.exp()
            kept[part] = q
            kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
            variation = 1 - torch.minimum(p, q).sum(-1)
            found = torch.stack([kl, variation, torch.ones_like(kl)])
            sums += found[:, mask[part]].sum(-1)
        whole = total(sums.clone())  # of all processes
        count = whole[2].clamp(min=1)
        kl, variation, everywhere = torch.stack([sums[0], sums[1], whole[1]]).div(count).tolist()
        shares = {
            "kl": (1.0, 0.0),
            "ce": (1.0, 0.0),  # the divergence from one token, which has no entropy
            "tv": (0.0, 1.0),
            "lk_hybrid": (mixed := math.exp(-HYBRID_RATE * (1 - everywhere)), 1 - mixed),
        }
        ctx.shares, ctx.kind = shares[kind], kind
        shared = (mask / count).float()
        ctx.save_for_backward(states, weight, teacher, places, shared, kept)
        return states.new_tensor(
            ctx.shares[0] * kl + ctx.shares[1] * variation, dtype=torch.float32
        )

    @staticmethod
    def backward(ctx: Any, *above: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of states [N, H] and head [V, H]; nothing else has any."""
        states, weight, teacher, places, shares, kept = ctx.saved_tensors
        of_logits = torch.empty_like(kept)
        for rows in range(0, len(states), ROWS):
            part = slice(rows, rows + ROWS)
            p, q = _wanted(teacher[places[part]], ctx.kind), kept[part].float()
            found = ctx.shares[0] * (q - p)
            if ctx.shares[1]:
                below = q * (q < p)
                found += ctx.shares[1] * (q * below.sum(-1, keepdim=True) - below)
            of_logits[part] = found.mul_(above[0] * shares[part, None])
        return of_logits @ weight, of_logits.T @ states, *[None] * 5


def _wanted(teacher: Tensor, kind: Loss) -> Tensor:
    """p, or all of it on its likeliest token, fp32."""
    p = teacher.float()
    if kind == "ce":
        return functional.one_hot(p.argmax(-1), p.shape[-1]).float()
    return p
