"""Decoder and head apart must be the model, for families that do something after the head."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models import cohere, gemma2, gpt2, granite, mixtral, opt, qwen2

from compressor.errors import ModelError
from compressor.evaluation.scoring import (
    StreamingScorer,
    TransformersScorer,
    can_stream,
    resolve_dtype,
)
from compressor.progress import SilentObserver
from compressor.types import TokenBatch
from tests.evaluation.conftest import tiny_llama

SMALL = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.5,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "gemma2-soft-cap": gemma2.Gemma2Config(**SMALL, final_logit_softcapping=2.0),
    "granite-scaling": granite.GraniteConfig(**SMALL, logits_scaling=7.0),
    "cohere-scale": cohere.CohereConfig(**SMALL, logit_scale=0.25),
    "qwen2-untied": qwen2.Qwen2Config(**SMALL, tie_word_embeddings=False),
    "opt-nested-decoder": opt.OPTConfig(
        vocab_size=99, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64,
    ),
    "mixtral-router": mixtral.MixtralConfig(**SMALL, num_local_experts=2),
    "gpt2": gpt2.GPT2Config(vocab_size=99, n_embd=32, n_layer=2, n_head=4, n_positions=64),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_head_on_states_is_the_model(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family]).eval()
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    ids = torch.randint(3, 99, (2, 16))
    with torch.no_grad():
        expected = model(ids).logits
    scorer = TransformersScorer(tmp_path)
    (states,) = scorer.states([TokenBatch(ids, torch.ones_like(ids, dtype=torch.bool), ("", ""))])
    got = scorer.logits(states.flatten(0, 1))
    torch.testing.assert_close(got, expected.flatten(0, 1), atol=1e-6, rtol=1e-5)
    assert scorer.vocab == 99


def batches(lengths: tuple[tuple[int, ...], ...]) -> list[TokenBatch]:
    found = []
    for own in lengths:
        ids = torch.randint(3, 99, (len(own), max(own)))
        mask = torch.arange(max(own))[None] < torch.tensor(own)[:, None]
        found.append(TokenBatch(ids * mask, mask, ("",) * len(own)))
    return found


STREAMED = ["gemma2-soft-cap", "granite-scaling", "qwen2-untied", "mixtral-router", "gpt2"]


@pytest.mark.parametrize("family", STREAMED)
@pytest.mark.parametrize("budget", [1 << 30, 0], ids=["in memory", "spilled"])
def test_block_by_block_equals_the_whole_model(family: str, budget: int, tmp_path: Path) -> None:
    """Two backends, one number: a run and a later `compress eval` must agree to the bit."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(FAMILIES[family]).save_pretrained(tmp_path / "model")
    cpu, text = torch.device("cpu"), batches(((16, 9), (12,)))
    whole = TransformersScorer(tmp_path / "model")
    streamed = StreamingScorer(
        tmp_path / "model", cpu, torch.float32,
        scratch=tmp_path / "scratch", budget=budget, observer=SilentObserver(),
    )  # fmt: skip
    assert (streamed.vocab, streamed.dtype, streamed.backend) == (99, whole.dtype, whole.backend)
    for batch, a, b in zip(text, whole.states(text), streamed.states(text), strict=True):
        assert torch.equal(a[batch.mask], b[batch.mask])
        assert torch.equal(whole.logits(a[batch.mask]), streamed.logits(b[batch.mask]))
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("family", ["gemma2-soft-cap", "qwen2-untied", "gpt2"])
def test_a_head_is_another_s_if_bytes_and_configuration_agree(family: str, tmp_path: Path) -> None:
    """Then one of them is enough to turn the states of both into logits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(FAMILIES[family])

    def saved(name: str) -> StreamingScorer:
        model.save_pretrained(tmp_path / name)
        return StreamingScorer(
            tmp_path / name, torch.device("cpu"), torch.float32,
            scratch=tmp_path / "scratch", budget=0, observer=SilentObserver(),
        )  # fmt: skip

    base = saved("base")
    within = next(p for name, p in model.named_parameters() if "layers.0" in name or ".h.0" in name)
    within.data.mul_(2)
    rounded = saved("rounded")
    assert rounded.has_head_of(base)
    states = torch.randn(5, model.config.hidden_size)
    assert torch.equal(rounded.logits(states), base.logits(states))
    model.get_output_embeddings().weight.data[3, 0] += 1
    assert not saved("another head").has_head_of(base)
    model.get_output_embeddings().weight.data[3, 0] -= 1
    model.config.bos_token_id = 7
    assert not saved("another configuration").has_head_of(base)


def test_only_plain_checkpoints_of_known_families_stream(base_path: Path, tmp_path: Path) -> None:
    assert can_stream(base_path)
    (tmp_path / "config.json").write_text('{"model_type": "cohere"}')
    assert not can_stream(tmp_path)
    config = json.loads((base_path / "config.json").read_text())
    packed = config | {"quantization_config": {"quant_method": "compressed-tensors"}}
    (tmp_path / "config.json").write_text(json.dumps(packed))
    assert not can_stream(tmp_path)


def test_a_model_that_does_not_split_is_refused(
    base_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A family whose logits depend on more than the decoder's states must not pass silently."""
    family = type(tiny_llama())
    forward = family.forward

    def with_a_bias_from_the_ids(self: torch.nn.Module, input_ids: torch.Tensor, **rest: object):  # type: ignore[no-untyped-def]
        output = forward(self, input_ids=input_ids, **rest)
        output.logits = output.logits + input_ids[..., None].float()
        return output

    monkeypatch.setattr(family, "forward", with_a_bias_from_the_ids)
    with pytest.raises(ModelError, match="LlamaForCausalLM does more between decoder and logits"):
        TransformersScorer(base_path)


def test_padding_and_batch_do_not_change_a_state(base: TransformersScorer) -> None:
    ids = torch.randint(0, 250, (4, 20))
    for row, length in enumerate((20, 13, 5, 1)):
        ids[row, length:] = 0
    mask = torch.arange(20)[None] < torch.tensor([20, 13, 5, 1])[:, None]
    (together,) = base.states([TokenBatch(ids, mask, ("",) * 4)])
    for row, length in enumerate((20, 13, 5, 1)):
        own = TokenBatch(ids[row : row + 1, :length], mask[row : row + 1, :length], ("",))
        (alone,) = base.states([own])
        torch.testing.assert_close(together[row, :length], alone[0], atol=1e-5, rtol=1e-5)


def test_auto_precision() -> None:
    assert resolve_dtype("auto", torch.device("cpu")) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert resolve_dtype("bfloat16", torch.device("cpu")) is torch.bfloat16
