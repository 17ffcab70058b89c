"""Windows against independent readings of the three original scripts."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.errors import TextError, UsageError
from compressor.evaluation.protocols import (
    TokenizedText,
    batches,
    encode,
    rolling,
    tokenize,
)
from compressor.evaluation.suites import EvaluationText
from compressor.text import Document
from tests.evaluation.conftest import byte_tokenizer, sample_text, tiny_llama

LENGTH = 48


def our_mean_nll(model: LlamaForCausalLM, text: TokenizedText) -> float:
    """Mean NLL over scored tokens, one window at a time, straight from the window's definition."""
    total, count = 0.0, 0
    for window in text.windows:
        ids = torch.from_numpy(window.tokens)[None]
        with torch.no_grad():
            logp = model(ids[:, :-1]).logits[0].log_softmax(-1)
        picked = logp[window.first - 1 :].gather(-1, ids[0, window.first :, None])
        total -= float(picked.sum())
        count += len(picked)
    return total / count


def joined(text: EvaluationText) -> str:
    (documents,) = text.domains.values()
    return "\n\n".join(document.text for document in documents)


def one_domain(protocol: str, length: int = LENGTH) -> EvaluationText:
    text = sample_text(protocol, length)
    return EvaluationText("test", {"prose": text.domains["prose"]}, text.protocol, length)


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_gptq_equals_the_original_loop(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(which)
    model, text = tiny_llama(), one_domain("gptq")

    ids = tokenizer(joined(text), return_tensors="pt").input_ids
    nlls = []
    for i in range(ids.numel() // LENGTH):
        window = ids[:, i * LENGTH : (i + 1) * LENGTH]
        with torch.no_grad():
            logits = model(window).logits
        loss = torch.nn.functional.cross_entropy(logits[0, :-1], window[0, 1:])
        nlls.append(loss.float() * LENGTH)
    original = torch.exp(torch.stack(nlls).sum() / (len(nlls) * LENGTH))

    ours = np.exp(our_mean_nll(model, tokenize(text, tokenizer)))
    assert ours == pytest.approx(float(original), rel=1e-6)


@pytest.mark.parametrize("which", ["tokenizer", "bos_tokenizer"])
def test_llama_cpp_equals_the_original_loop(which: str, request: pytest.FixtureRequest) -> None:
    tokenizer: PreTrainedTokenizerFast = request.getfixturevalue(which)
    model, text = tiny_llama(), one_domain("llama.cpp")

    add_bos = which == "bos_tokenizer"
    tokens = tokenizer(joined(text)).input_ids
    nll, count, first = 0.0, 0, LENGTH // 2
    for chunk in range(len(tokens) // LENGTH):
        original = tokens[chunk * LENGTH : (chunk + 1) * LENGTH]
        seen = [256, *original[1:]] if add_bos else original
        with torch.no_grad():
            logp = model(torch.tensor([seen])).logits[0].log_softmax(-1)
        for i in range(LENGTH - 1 - first):
            nll -= float(logp[first + i, original[first + i + 1]])
            count += 1

    windows = tokenize(text, tokenizer)
    assert sum(window.scored for window in windows.windows) == count
    assert our_mean_nll(model, windows) == pytest.approx(nll / count, rel=1e-6)
    assert windows.bos == ("replace-first" if add_bos else "none")


def harness_windows(
    tokens: list[int], prefix: int, length: int
) -> Iterator[tuple[list[int], list[int]]]:
    """lm-evaluation-harness: get_rolling_token_windows, then make_disjoint_window."""
    first = min(length, len(tokens))
    yield [prefix, *tokens[: first - 1]], tokens[:first]
    predicted = first
    while predicted < len(tokens):
        count = min(len(tokens) - predicted, length)
        end = predicted + count
        yield tokens[end - length - 1 : end - 1], tokens[end - count : end]
        predicted += count


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 60), st.integers(2, 20))
def test_rolling_windows_are_those_of_the_harness(count: int, length: int) -> None:
    tokens = list(range(100, 100 + count))
    expected = list(harness_windows(tokens, 7, length))
    ours = list(rolling(np.array(tokens), 7, length))
    assert len(ours) == len(expected)
    for (ids, first), (inputs, continuation) in zip(ours, expected, strict=True):
        assert ids[:-1].tolist() == inputs
        assert ids[first:].tolist() == continuation
        assert len(inputs) <= length


def test_rolling_equals_the_harness_on_a_model(tokenizer: PreTrainedTokenizerFast) -> None:
    model, text = tiny_llama(), one_domain("rolling")
    nll, count = 0.0, 0
    for document in text.domains["prose"]:
        tokens = tokenizer(document.text, add_special_tokens=False).input_ids
        for inputs, continuation in harness_windows(tokens, 256, LENGTH):
            with torch.no_grad():
                logp = model(torch.tensor([inputs])).logits[0].log_softmax(-1)
            for logits, token in zip(logp[-len(continuation) :], continuation, strict=True):
                nll -= float(logits[token])
                count += 1
    assert our_mean_nll(model, tokenize(text, tokenizer)) == pytest.approx(nll / count, rel=1e-6)


def test_rolling_bytes_are_those_of_the_text(bos_tokenizer: PreTrainedTokenizerFast) -> None:
    text = sample_text()
    windows = tokenize(text, bos_tokenizer).windows
    for domain, documents in text.domains.items():
        for number, document in enumerate(documents):
            own = [w for w in windows if w.domain == domain and w.cluster == number]
            assert sum(int(w.sizes.sum()) for w in own) == len(document.text.encode())
            assert {w.document for w in own} == {document.id}


@given(st.text(alphabet="aé–漢🙂 \n", max_size=30))
@settings(max_examples=100, deadline=None)
def test_sizes_sum_to_the_bytes(text: str) -> None:
    tokens = encode(byte_tokenizer(add_bos=True), text, special=True)
    if text:
        assert tokens.sizes.sum() == len(text.encode())
    assert tokens.sizes[0] == 0  # BOS stands for nothing
    assert (tokens.sizes >= 0).all()


def test_special_tokens_after_the_text_stand_for_nothing() -> None:
    """Their character offsets are (0, 0), which must not count backwards."""
    tokenizer = byte_tokenizer(add_bos=False)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s> <s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    assert encode(tokenizer, "aé", special=True).sizes.tolist() == [1, 2, 0, 0, 0]


def test_a_lone_document_is_clustered_by_window(tokenizer: PreTrainedTokenizerFast) -> None:
    text = EvaluationText("x", {"a": (Document("1", "a", "word " * 40),)}, "rolling", 32)
    windows = tokenize(text, tokenizer).windows
    assert [window.cluster for window in windows] == list(range(len(windows)))
    assert len(windows) == 7


def test_batches_hold_every_window_once(windows: TokenizedText) -> None:
    groups = batches(windows, 4)
    assert sorted(index for group in groups for index in group) == list(range(len(windows.windows)))
    lengths = [len(windows.windows[i].tokens) for group in groups for i in group]
    assert lengths == sorted(lengths, reverse=True)


def test_a_suite_shrinks_to_the_context_and_a_user_is_told(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    text = sample_text(length=64)
    assert tokenize(text, tokenizer, max_length=32).length == 32
    asked = EvaluationText("x", text.domains, "rolling", 64, length_is_fixed=True)
    with pytest.raises(UsageError, match=r"evaluate\.length is 64.*holds 32"):
        tokenize(asked, tokenizer, max_length=32)


def test_text_shorter_than_a_window_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    text = EvaluationText("x", {"a": (Document("1", "a", "short"),)}, "gptq", 32)
    with pytest.raises(TextError, match="'a' has 5 tokens, fewer than one window of 32"):
        tokenize(text, tokenizer)
