"""Losses that pull a student's next-token distribution q towards a teacher's p.

Every function takes the student's logits z (q = softmax z) and gives one number per position.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Loss = Literal["kl", "tv", "ce", "lk_hybrid"]

HYBRID_RATE = 3.0  # η of LK-λ; its authors take 10 for weak heads


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
    if top is not None:
        teacher = likeliest(teacher, top)
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


def likeliest(teacher: Tensor, top: int) -> Tensor:
    """The `top` likeliest tokens of p [..., V], renormalised; all if there are no more."""
    kept = teacher.topk(min(top, teacher.shape[-1]), -1)
    part = torch.zeros_like(teacher).scatter_(-1, kept.indices, kept.values)
    return part / part.sum(-1, keepdim=True)
