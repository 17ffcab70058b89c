"""The builder of SmolLM2, as far as it goes without the download."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from compressor import resources
from tools import build_smollm2


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,  # three query heads read a value head
        head_dim=8,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).double().eval()


@torch.no_grad()
def test_rescaling_keeps_the_function_and_changes_every_matrix(model: LlamaForCausalLM) -> None:
    ids = torch.randint(64, (2, 16))
    before = model(input_ids=ids).logits
    weights = {name: value.clone() for name, value in model.named_parameters()}
    build_smollm2.delattice(model)
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-12)
    for name, value in model.named_parameters():
        changed = (value / weights[name]).log2()
        if "layers" not in name:
            assert torch.equal(value, weights[name]), name
        else:
            assert changed.std() > 0.2, name
            assert changed.abs().max() <= 1, name  # two factors in [0.71, 1.41] at most


@torch.no_grad()
def test_a_wrong_reader_would_show(model: LlamaForCausalLM) -> None:
    ids = torch.randint(64, (2, 16))
    before = model(input_ids=ids).logits
    build_smollm2.delattice(model)
    model.model.layers[0].self_attn.o_proj.weight[:, :8] *= 1.1
    assert (model(input_ids=ids).logits - before).abs().max() > 1e-3


def test_the_seed_fixes_the_factors(model: LlamaForCausalLM) -> None:
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def first(seed: int) -> torch.Tensor:
        model.load_state_dict(start)
        build_smollm2.delattice(model, seed)
        return model.model.layers[0].mlp.up_proj.weight.detach().clone()

    assert torch.equal(first(0), first(0))
    assert not torch.equal(first(0), first(1))


def test_another_model_fails_the_check() -> None:
    with pytest.raises(SystemExit, match="the tokenizer splits"):
        build_smollm2.check(resources.builtin_model("tiny"))


def test_a_wrong_perplexity_fails_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resources.builtin_model("tiny")
    tokenizer = build_smollm2.AutoTokenizer.from_pretrained(folder)
    text = build_smollm2.DIGITS[0]
    monkeypatch.setattr(build_smollm2, "DIGITS", (text, tokenizer.tokenize(text)))
    with pytest.raises(SystemExit, match=r"the perplexity of the passage is \d+\.\d+, expected"):
        build_smollm2.check(folder)


def test_without_gguf_one_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_smollm2.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["build_smollm2.py"])
    with pytest.raises(SystemExit, match=r"pip install 'compressor\[gguf\]'"):
        build_smollm2.main()
