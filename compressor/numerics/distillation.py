"""Losses that pull a student's next-token distribution q towards a teacher's p.

Every function takes the student's logits z (q = softmax z) and gives one number per position.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional

Loss = Literal["kl", "tv", "ce", "lk_hybrid"]

HYBRID_RATE = 3.0  # η of LK-λ; its authors take 10 for weak heads
ROWS = 64  # positions at once: a few MB, which stay in the cache while they are worked on


def divergence(
    kind: Loss, logits: Tensor, teacher: Tensor, mask: Tensor, top: int | None = None
) -> Tensor:
    """Mean loss over the positions that count.

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
    """
    logits, teacher = logits[mask], teacher[mask]
    teacher = truncated(teacher, top)
    if not len(logits):
        return logits.sum() * 0.0
    if kind == "kl":
        return forward_kl(logits, teacher).mean()
    if kind == "tv":
        return total_variation(logits, teacher).mean()
    if kind == "ce":
        return functional.cross_entropy(logits.float(), teacher.argmax(-1))
    variation = total_variation(logits, teacher).mean()
    share = torch.exp(-HYBRID_RATE * (1 - variation.detach()))
    return share * forward_kl(logits, teacher).mean() + (1 - share) * variation


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
    states: Tensor, weight: Tensor, teacher: Tensor, places: Tensor, mask: Tensor, kind: Loss
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
        kind: as for `divergence`.
    """
    inputs = states.to(teacher.dtype), weight.to(teacher.dtype)
    found: Tensor = _Taught.apply(*inputs, teacher, places, mask, kind)  # type: ignore[no-untyped-call]
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
    ) -> Tensor:
        """The loss, fp32 scalar; arguments as of `teach`. Keeps q [N, V]."""
        kept = torch.empty(len(states), len(weight), dtype=states.dtype, device=states.device)
        totals, count = torch.zeros(2, dtype=torch.float64, device=states.device), mask.sum()
        for rows in range(0, len(states), ROWS):
            part = slice(rows, rows + ROWS)
            p, logits = _wanted(teacher[places[part]], kind), (states[part] @ weight.T).float()
            log_q = logits.log_softmax(-1)
            q = log_q.exp()
            kept[part] = q
            kl = (torch.special.xlogy(p, p) - p * log_q).sum(-1)
            variation = 1 - torch.minimum(p, q).sum(-1)
            totals += torch.stack([kl, variation])[:, mask[part]].sum(-1)
        kl, variation = (totals / count.clamp(min=1)).tolist()
        shares = {
            "kl": (1.0, 0.0),
            "ce": (1.0, 0.0),  # the divergence from one token, which has no entropy
            "tv": (0.0, 1.0),
            "lk_hybrid": (mixed := math.exp(-HYBRID_RATE * (1 - variation)), 1 - mixed),
        }
        ctx.shares, ctx.kind = shares[kind], kind
        ctx.save_for_backward(states, weight, teacher, places, mask / count.clamp(min=1), kept)
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
        return of_logits @ weight, of_logits.T @ states, None, None, None, None


def _wanted(teacher: Tensor, kind: Loss) -> Tensor:
    """p, or all of it on its likeliest token, fp32."""
    p = teacher.float()
    if kind == "ce":
        return functional.one_hot(p.argmax(-1), p.shape[-1]).float()
    return p
