from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from compressor.errors import VerificationError
from compressor.verify import verify_divergence, verify_export, verify_tensors

PARENT = {
    "a.weight": torch.arange(1.0, 13.0).view(3, 4),
    "b.weight": torch.ones(2, 2, dtype=torch.bfloat16),
    "zero.bias": torch.zeros(3),
}


def save(folder, **changes):
    folder.mkdir()
    tensors = {**PARENT, **{name.replace("__", "."): value for name, value in changes.items()}}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / "model.safetensors")
    return folder


def check(tmp_path, changed=("a.weight",), **changes):
    verify_tensors(save(tmp_path / "parent"), save(tmp_path / "child", **changes), changed)


def test_a_changed_target_and_untouched_rest_pass(tmp_path):
    check(tmp_path, a__weight=PARENT["a.weight"] + 0.5)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({}, "a.weight was to be changed, but is identical"),
        ({"a__weight": torch.full((3, 4), float("nan"))}, "a.weight holds a NaN"),
        ({"a__weight": torch.zeros(3, 4)}, "a.weight is all zero"),
        ({"a__weight": torch.ones(4, 3)}, "went from torch.float32 [3, 4]"),
        (
            {
                "a__weight": PARENT["a.weight"] + 1,
                "b__weight": torch.ones(2, 2, dtype=torch.bfloat16) * 1.01,
            },
            "b.weight was not to be changed",
        ),
        (
            {"a__weight": PARENT["a.weight"] + 1, "zero__bias": -PARENT["zero.bias"]},
            "zero.bias was not to be changed",
        ),
        ({"a__weight": PARENT["a.weight"] + 1, "b__weight": None}, "b.weight is missing"),
        ({"a__weight": PARENT["a.weight"] + 1, "c__weight": torch.ones(1)}, "c.weight is new"),
    ],
)
def test_each_broken_promise_is_named(tmp_path, changes, sentence):
    with pytest.raises(VerificationError) as caught:
        check(tmp_path, **changes)
    assert sentence in str(caught.value)


def test_all_problems_are_reported_at_once(tmp_path):
    with pytest.raises(VerificationError, match="3 promises"):
        check(tmp_path, changed=("a.weight", "ghost"), c__weight=torch.ones(1))


def test_a_declared_addition_passes_and_must_hold_numbers(tmp_path):
    new = {"a__weight": PARENT["a.weight"] + 1, "head__weight": torch.ones(2, 2)}
    parent, child = save(tmp_path / "parent"), save(tmp_path / "child", **new)
    verify_tensors(parent, child, ("a.weight",), ("head.weight",))
    for added, sentence in (
        ((), "head.weight is new"),
        (("head.weight", "ghost"), "ghost is missing"),
        (("head.weight", "b.weight"), "b.weight was to be added, but the parent has it"),
    ):
        with pytest.raises(VerificationError, match=sentence):
            verify_tensors(parent, child, ("a.weight",), added)
    for value, sentence in ((float("nan"), "NaN"), (0.0, "all zero")):
        folder = tmp_path / sentence
        broken = save(folder, **{**new, "head__weight": torch.full((2, 2), value)})
        with pytest.raises(VerificationError, match=f"head.weight .*{sentence}"):
            verify_tensors(parent, broken, ("a.weight",), ("head.weight",))


def test_divergence_matches_a_hand_computed_kl_and_refuses_what_is_worse_than_guessing():
    parent = torch.tensor([[0.7, 0.2, 0.1]]).log()
    child = torch.tensor([[0.5, 0.3, 0.2]]).log()
    expected = (
        0.7 * torch.tensor(1.4).log()
        + 0.2 * torch.tensor(2 / 3).log()
        + 0.1 * torch.tensor(0.5).log()
    )
    assert verify_divergence(parent, child, "stage") == pytest.approx(float(expected), abs=1e-7)
    assert verify_divergence(parent, parent, "stage") == 0.0
    for broken in (parent.flip(1) * 4, torch.full((1, 3), float("nan"))):
        with pytest.raises(VerificationError, match="destroyed"):
            verify_divergence(parent, broken, "stage")


def test_export_must_agree_exactly_unless_told_otherwise():
    logits = torch.randn(4, 8)
    assert verify_export(logits, logits.clone(), "x") == 0.0
    with pytest.raises(VerificationError, match="read back from disk"):
        verify_export(logits, logits + 1e-6, "x")
    with pytest.raises(VerificationError, match="nan"):
        verify_export(logits, logits * float("nan"), "x")
