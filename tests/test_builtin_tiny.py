"""The built-in model: its shape, its tokenizer, and that it has learnt the five English domains."""

from __future__ import annotations

import gzip
import json
import math
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from compressor import resources, text

FOLDER = resources.builtin_model("tiny")
ENGLISH = ("code", "docs", "encyclopedia", "prose", "speeches")
WINDOW = 512
MARGIN = 0.8  # of gzip's bits per byte; measured 0.51 to 0.70


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32).eval()


def test_it_is_small_and_safe() -> None:
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) <= 12e6
    assert set(files) == {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_widths_divide_by_64_and_not_by_128() -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    for name in ("hidden_size", "intermediate_size"):
        assert config[name] % 64 == 0
        assert config[name] % 128 != 0
    assert config["num_attention_heads"] > config["num_key_value_heads"]
    assert config["num_attention_heads"] * config["head_dim"] == config["hidden_size"]
    assert config["tie_word_embeddings"]


def test_tensors_are_bfloat16_with_the_tied_head_stored_once() -> None:
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        names = set(file.keys())
        tensors = {name: file.get_tensor(name) for name in names}
    assert "lm_head.weight" not in names
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())
    assert sum(tensor.numel() for tensor in tensors.values()) == 5_491_520


def test_head_and_embedding_are_one_tensor(model: Any) -> None:
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_special_tokens_agree_with_the_config(tokenizer: Any) -> None:
    config = json.loads((FOLDER / "config.json").read_text())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)
    assert len(tokenizer) == config["vocab_size"] == 4096


@settings(deadline=None)
@given(st.text(max_size=200))
@example("  leading, trailing\t\n\n  ")
@example("don 't join , these .")
@example("日本語 עברית 🙂 \x00")
def test_tokenizer_round_trips_every_text(tokenizer: Any, written: str) -> None:
    ids = tokenizer(written, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == written


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, documents: list[text.Document]) -> float:
    """Over the head of each document, without any context before it."""
    nats, size = 0.0, 0
    for document in documents:
        ids = tokenizer(document.text)["input_ids"][: WINDOW - 1]
        window = torch.tensor([[tokenizer.bos_token_id, *ids]])
        logits = model(window[:, :-1]).logits[0]
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        size += len(tokenizer.decode(ids).encode())
    return nats / size / math.log(2)


def gzip_bits_per_byte(documents: list[text.Document]) -> float:
    joined = "\n\n".join(document.text for document in documents).encode()
    return 8 * len(gzip.compress(joined, 9, mtime=0)) / len(joined)


@pytest.mark.parametrize("domain", ENGLISH)
def test_it_beats_gzip_on_every_english_domain(domain: str, model: Any, tokenizer: Any) -> None:
    documents = text.evaluation_documents(domain)
    sample = documents[:: len(documents) // 8]
    assert bits_per_byte(model, tokenizer, sample) < MARGIN * gzip_bits_per_byte(documents)


def test_one_text_scores_the_same_in_any_row_of_a_batch(model: Any, tokenizer: Any) -> None:
    ids = tokenizer("The state of the Union is strong.")["input_ids"]
    with torch.no_grad():
        alone = model(torch.tensor([ids])).logits
        twice = model(torch.tensor([ids, ids])).logits
    torch.testing.assert_close(twice, alone.expand_as(twice), atol=1e-4, rtol=1e-4)
