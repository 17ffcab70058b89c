"""How far a student's predictions are from a teacher's.

KL(T || S) = Σ_v t_v (log t_v - log s_v), the forward divergence of Hinton et al. 2015,
arXiv:1503.02531: the student must put mass wherever the teacher does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Logits worked on at once: few enough to stay in a processor's cache, enough to fill a GPU.
_CACHED, _LAUNCHED = 2**17, 2**27


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
    if top is None:
        found: Tensor = _Divergence.apply(teacher, student, temperature)  # type: ignore[no-untyped-call]
        return found
    if not 1 <= top < teacher.shape[-1]:
        raise ValueError(f"top {top} is not between 1 and {teacher.shape[-1] - 1}")
    logs = [_log_softmax(logits, temperature) for logits in (teacher.detach(), student)]
    index = logs[0].topk(top, -1).indices
    expected, found = (_with_rest(one.gather(-1, index)) for one in logs)
    return (expected.exp() * (expected - found)).sum(-1) * temperature**2


class _Divergence(torch.autograd.Function):
    """The divergence over all tokens, which keeps nothing but its gradient.

    T² KL(T || S) has the gradient T (s - t) in the student's logits; it is formed with the value, a
    few tokens at a time, and kept in the dtype of the logits.
    """

    @staticmethod
    def forward(ctx: Any, teacher: Tensor, student: Tensor, temperature: float) -> Tensor:
        values = torch.empty(len(student), dtype=torch.float32, device=student.device)
        slope = torch.empty_like(student) if ctx.needs_input_grad[1] else None
        for part in cached_parts(student):
            expected = _log_softmax(teacher[part], temperature)
            found = _log_softmax(student[part], temperature)
            shares = expected.exp()
            values[part] = expected.sub_(found).mul_(shares).sum(-1)
            if slope is not None:
                slope[part] = found.exp_().sub_(shares).mul_(temperature)
        ctx.save_for_backward(slope)
        return values.mul_(temperature**2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        (slope,) = ctx.saved_tensors
        return None, slope * gradient[:, None].to(slope), None


def cached_parts(logits: Tensor) -> Iterator[slice]:
    """Rows of [tokens, vocabulary] that are best worked on together, one part after the other."""
    room = _CACHED if logits.device.type == "cpu" else _LAUNCHED
    rows = max(1, room // logits.shape[-1])
    return (slice(start, start + rows) for start in range(0, len(logits), rows))


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(logits, -1)


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
