"""The divergence to a teacher, against torch's and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from compressor.numerics.recovery import hidden_distance, logit_divergence


def logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(5, 11, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_it_is_the_divergence_of_torch(temperature: float) -> None:
    teacher, student = logits(1), logits(2)
    expected = functional.kl_div(
        torch.log_softmax(student / temperature, -1),
        torch.softmax(teacher / temperature, -1),
        reduction="none",
    )
    found = logit_divergence(teacher, student, temperature=temperature)
    torch.testing.assert_close(found, expected.sum(-1) * temperature**2)


def test_a_perfect_student_is_at_distance_zero_and_only_it_learns() -> None:
    teacher = logits(1).requires_grad_()
    student = logits(1).requires_grad_()
    assert logit_divergence(teacher, student).abs().max() < 1e-6
    logit_divergence(teacher, student * 0.5).sum().backward()
    assert teacher.grad is None
    assert student.grad.abs().max() > 0


def test_the_gradient_pulls_the_student_to_the_teacher() -> None:
    teacher, student = logits(1), logits(2).requires_grad_()
    logit_divergence(teacher, student).sum().backward()
    expected = torch.softmax(student, -1) - torch.softmax(teacher, -1)
    torch.testing.assert_close(student.grad, expected.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_few_tokens_at_a_time_are_all_of_them(
    dtype: torch.dtype, temperature: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and weighted gradients against autograd's; the last part is short."""
    monkeypatch.setattr("compressor.numerics.recovery._CACHED", 2 * 11)
    teacher, student = logits(1).to(dtype), logits(2).to(dtype).requires_grad_()
    weights = torch.tensor([1.0, 0.0, -2.0, 0.5, 3.0])
    found = logit_divergence(teacher, student, temperature=temperature)
    (gradient,) = torch.autograd.grad(found @ weights, student)
    logs = [torch.log_softmax(x.float() / temperature, -1) for x in (teacher, student)]
    expected = functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    expected = expected * temperature**2
    (whole,) = torch.autograd.grad(expected @ weights, student)
    torch.testing.assert_close(found, expected)
    assert gradient.dtype == dtype
    torch.testing.assert_close(
        gradient, whole, atol=1e-6 if dtype == torch.float32 else 0.02, rtol=0.01
    )


def test_fewer_tokens_see_less_and_all_but_one_see_all() -> None:
    teacher, student = logits(1), logits(2)
    whole = logit_divergence(teacher, student)
    parts = [logit_divergence(teacher, student, top=top) for top in (1, 4, 10)]
    assert (parts[0] <= parts[1] + 1e-5).all()
    assert (parts[1] <= whole + 1e-5).all()
    torch.testing.assert_close(parts[2], whole, rtol=1e-4, atol=1e-4)


def test_a_certain_teacher_leaves_no_rest() -> None:
    teacher = torch.tensor([[100.0, 0.0, 0.0]])
    student = torch.zeros(1, 3, requires_grad=True)
    found = logit_divergence(teacher, student, top=1)
    found.sum().backward()
    assert found.item() == pytest.approx(torch.tensor(3.0).log().item(), rel=1e-4)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("top", [0, 11, 12])
def test_what_cannot_be_compared_is_refused(top: int) -> None:
    with pytest.raises(ValueError, match="not between 1 and 10"):
        logit_divergence(logits(1), logits(2), top=top)
    with pytest.raises(ValueError, match="do not pair"):
        logit_divergence(logits(1), logits(2)[:, :5])


def test_the_distance_of_hidden_states_is_the_share_that_is_missing() -> None:
    teacher = torch.tensor([[3.0, 4.0], [0.0, 5.0]], requires_grad=True)
    student = torch.tensor([[3.0, 4.0], [0.0, 0.0]], requires_grad=True)
    found = hidden_distance(teacher, student)
    found.backward()
    assert float(found.detach()) == pytest.approx(0.5)
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.tolist() == [[0, 0], [0, pytest.approx(-0.2)]]
