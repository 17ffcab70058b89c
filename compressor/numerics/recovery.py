"""How far a student's predictions are from a teacher's.

KL(T || S) = Σ_v t_v (log t_v - log s_v), the forward divergence of Hinton et al. 2015,
arXiv:1503.02531: the student must put mass wherever the teacher does.
"""

from __future__ import annotations

import torch
from torch import Tensor


def logit_divergence(
    teacher: Tensor, student: Tensor, *, top: int | None = None, temperature: float = 1.0
) -> Tensor:
    """KL(T || S) in nats for every token, fp32 [tokens].

    Args:
        teacher: logits [tokens, vocabulary], any float dtype; no gradient flows into them.
        student: logits of the same shape.
        top: compare the teacher's likeliest tokens one by one and all others as one; never above
            the divergence over all tokens. None compares every token.
        temperature: T > 0 that logits are divided by; the result is multiplied by T², so that
            gradients keep their size.

    Raises:
        ValueError: shapes differ, or `top` is not between 1 and the vocabulary less one.
    """
    if teacher.shape != student.shape:
        raise ValueError(f"logits {list(teacher.shape)} and {list(student.shape)} do not pair")
    expected = torch.log_softmax(teacher.detach().float() / temperature, -1)
    found = torch.log_softmax(student.float() / temperature, -1)
    if top is not None:
        if not 1 <= top < teacher.shape[-1]:
            raise ValueError(f"top {top} is not between 1 and {teacher.shape[-1] - 1}")
        index = expected.topk(top, -1).indices
        expected, found = (_with_rest(logs.gather(-1, index)) for logs in (expected, found))
    return (expected.exp() * (expected - found)).sum(-1) * temperature**2


def hidden_distance(teacher: Tensor, student: Tensor, energy: Tensor | None = None) -> Tensor:
    """Σ |t - s|² / Σ |t|² over all tokens: what share of the stream is missing, a scalar.

    Args:
        teacher: hidden states [tokens, hidden]; no gradient flows into them.
        student: of the same shape.
        energy: Σ |t|² where these tokens are some of all, a scalar; by default theirs.
    """
    expected = teacher.detach()
    whole = expected.square().sum() if energy is None else energy
    return (student - expected).square().sum() / whole


def _with_rest(logs: Tensor) -> Tensor:
    """Log probabilities [tokens, k] with that of everything else appended."""
    kept = logs.logsumexp(-1, keepdim=True)
    # 1 - Σ without cancellation, and never log 0 where the kept ones have all the mass.
    rest = torch.log((-torch.expm1(kept)).clamp_min(torch.finfo(logs.dtype).eps))
    return torch.cat([logs, rest], -1)
