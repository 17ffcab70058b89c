"""Tiny real models and a byte-level tokenizer, made in the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from compressor.evaluation.protocols import TokenizedText, tokenize
from compressor.evaluation.scoring import TransformersScorer
from compressor.evaluation.suites import EvaluationText
from compressor.text import Document

VOCAB = 258  # 256 bytes, BOS, EOS


def byte_tokenizer(add_bos: bool) -> PreTrainedTokenizerFast:
    """One token per UTF-8 byte; with `add_bos` a text starts with BOS, as Llama's does."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: number for number, character in enumerate(alphabet)}
    vocab |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(add_bos=False)


@pytest.fixture(scope="session")
def bos_tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer(add_bos=True)


def tiny_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": VOCAB,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "tie_word_embeddings": True,
            "initializer_range": 0.3,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def base_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("base")
    tiny_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def variant_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with noise on every matrix, as rounding would leave it."""
    path = tmp_path_factory.mktemp("variant")
    model = tiny_llama()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.05 * parameter.std().nan_to_num(0.0) * noise)
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def base(base_path: Path) -> TransformersScorer:
    return TransformersScorer(base_path)


@pytest.fixture(scope="session")
def variant(variant_path: Path) -> TransformersScorer:
    return TransformersScorer(variant_path)


def sample_text(protocol: str = "rolling", length: int = 48) -> EvaluationText:
    """Two domains of ragged documents, some shorter and some longer than a window."""
    sentence = "Ein Käfer – größer als π – läuft über die Wiese, und niemand schaut hin. "
    domains = {
        name: tuple(
            Document(f"{name}-{i}", name, (sentence[i + shift :] * 3)[: 7 + 29 * i])
            for i in range(6)
        )
        for shift, name in enumerate(("prose", "code"))
    }
    return EvaluationText("test", domains, protocol, length)  # type: ignore[arg-type]


@pytest.fixture
def windows(tokenizer: PreTrainedTokenizerFast) -> TokenizedText:
    return tokenize(sample_text(), tokenizer)
