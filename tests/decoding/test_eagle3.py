"""EAGLE-3 heads: unrolled in training as they run, lossless in decoding, written for engines."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from compressor import resources
from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Corpus, Head
from compressor.decoding.decode import Limits, decode, first_difference, margin
from compressor.decoding.eagle3 import (
    Eagle3,
    Eagle3Draft,
    draft_vocabulary,
    layer_config,
    load_eagle3,
    start_from_target,
    unroll,
)
from compressor.decoding.proposals import Chain, Committed, Tree
from compressor.errors import ModelError, UsageError
from compressor.formats.eagle3 import default_layers, speculators_tensors
from compressor.model.architecture import Architecture
from compressor.model.load import load_model, read_config
from compressor.numerics.speculative import ROOT, Sampling
from compressor.progress import SilentObserver
from compressor.stages.draft_eagle3 import DraftEagle3
from compressor.stages.drafting_eagle3 import Lesson, _save, likeliest
from compressor.types import TokenBatch
from tests.model.conftest import build

LAYERS = (0, 1, 1)


@cache
def target() -> Any:
    return build("llama-tied-biased")


@cache
def head() -> Eagle3:
    """A random head that knows every third token."""
    torch.manual_seed(1)
    made = Eagle3(layer_config(target()), torch.arange(0, 96, 3), embedding())
    for parameter in made.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return made.eval()


def embedding() -> Tensor:
    weight: Tensor = target().get_input_embeddings().weight
    return weight


def features(ids: Tensor) -> Tensor:
    with torch.inference_mode():
        states = target()(ids, output_hidden_states=True).hidden_states
    return torch.cat([states[layer] for layer in LAYERS], -1)


def test_training_sees_what_drafting_computes() -> None:
    """At every index, the unrolled logits are those of a draft that is fed the same tokens."""
    ids = torch.tensor([[5, 9, 30, 22, 41, 63, 7, 8]])
    with torch.inference_mode():
        unrolled = [head().logits(states) for states in unroll(head(), features(ids), ids, 3)]
    assert [logits.shape[1] for logits in unrolled] == [7, 6, 5]
    for last in (0, 2, 4):
        draft = Eagle3Draft(head(), LAYERS)
        draft.start(1)
        known = ids[0, : last + 1]
        draft.observe(
            Committed(
                (tuple(known.tolist()),), (features(known[None])[0],), (int(ids[0, last + 1]),)
            )
        )
        with torch.inference_mode():
            found = [draft.root()[0]]
            for step in range(2):
                parent = torch.tensor([[step - 1]])
                found.append(draft.grow(ids[:, last + 2 + step][None], parent)[0, 0])
        for step, logits in enumerate(found):
            wanted = unrolled[step][0, last]
            torch.testing.assert_close(logits[head().ids], wanted, rtol=1e-4, atol=1e-4)
            outside = torch.ones(96, dtype=torch.bool).scatter_(0, head().ids, False)
            assert bool((logits[outside] == -torch.inf).all())


def test_a_tree_reads_each_path_by_itself() -> None:
    draft = Eagle3Draft(head(), LAYERS)
    ids = torch.tensor([[5, 9, 30]])

    def begin() -> None:
        draft.start(1)
        draft.observe(Committed(((5, 9, 30),), (features(ids)[0],), (12,)))
        draft.root()

    with torch.inference_mode():
        begin()
        first = draft.grow(torch.tensor([[3, 6]]), torch.tensor([[ROOT, ROOT]]))
        second = draft.grow(torch.tensor([[21, 24]]), torch.tensor([[1, 0]]))
        for place, path in enumerate(([6, 21], [3, 24])):
            begin()
            one = draft.grow(torch.tensor([[path[0]]]), torch.tensor([[ROOT]]))
            two = draft.grow(torch.tensor([[path[1]]]), torch.tensor([[0]]))
            torch.testing.assert_close(first[0, 1 - place], one[0, 0], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(second[0, place], two[0, 0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [Chain(3), Tree(3, 2, 6)], ids=str)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9)], ids=["greedy", "sampled"])
def test_decoding_with_a_head_is_lossless_and_rows_are_independent(
    shape: Any, sampling: Sampling
) -> None:
    prompts = [[5, 9, 30], [7, 8, 22, 41, 3], [60]]
    cached = CachedModel(target(), LAYERS)
    draft = Eagle3Draft(head(), LAYERS)
    found = decode(cached, prompts, Limits(20), draft=draft, shape=shape, sampling=sampling)
    assert all(len(row) == 20 for row in found.tokens)
    if sampling.greedy:
        plain = decode(cached, prompts, Limits(20))
        for prompt, mine, theirs in zip(prompts, found.tokens, plain.tokens, strict=True):
            place = first_difference(mine, theirs)
            assert place is None or margin(cached, [*prompt, *mine[:place]]) < 1e-3


def test_a_draft_of_other_features_is_refused() -> None:
    with pytest.raises(UsageError, match="reads layers"):
        decode(
            CachedModel(target(), (0, 0, 1)), [[1]], Limits(2), draft=Eagle3Draft(head(), LAYERS)
        )


def test_the_start_is_the_targets_last_block() -> None:
    """Fed with what enters that block, the untrained head gives the target's own logits."""
    model = build("qwen3", head_dim=8)
    for norm in ("q_norm", "k_norm"):  # which a Llama layer does not have
        getattr(model.model.layers[1].self_attn, norm).forward = lambda states: states
    ids = torch.arange(3, 96, 2)
    made = Eagle3(layer_config(model), ids, model.get_input_embeddings().weight)
    start_from_target(made, model, Head.of(model).rows(ids))
    tokens = torch.tensor([[5, 9, 30, 22, 41]])
    with torch.inference_mode():
        output = model(tokens, output_hidden_states=True)
        states = torch.cat([output.hidden_states[i] for i in (0, 0, 1)], -1)
        found = made.logits(unroll(made, states, tokens, 1)[0])
    torch.testing.assert_close(found, output.logits[:, :-1, ids], rtol=1e-4, atol=1e-4)


def test_the_vocabulary_is_the_most_frequent_tokens() -> None:
    counts = torch.tensor([3, 9, 3, 0, 5])
    assert draft_vocabulary(counts, 3).tolist() == [0, 1, 4]


def test_the_loss_leaves_out_what_the_draft_cannot_say(tmp_path: Path) -> None:
    """Against the definition, place by place."""
    ids = torch.tensor([[5, 9, 30, 22, 41, 63], [7, 8, 3, 4, 0, 0]])
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    corpus = Corpus(
        target(), [TokenBatch(ids, mask, ("", ""))], LAYERS, tmp_path, 10**6, SilentObserver()
    )
    whole = Head.of(target())
    said = likeliest(corpus, whole)
    assert torch.equal(said[0] >= 0, mask)
    config = DraftEagle3(ttt_steps=2, decay=0.5, loss="kl", precision="fp32")
    rows = whole.rows(head().ids)
    with torch.inference_mode():
        found = Lesson(config, head(), corpus, rows, said).loss(0)
        states = unroll(head(), corpus.features(0), ids, 2)
        unrolled = [head().logits(outputs) for outputs in states]
        total = 0.0
        for step, logits in enumerate(unrolled):
            losses = []
            for row in range(2):
                for index in range(logits.shape[1]):
                    place = index + 1 + step
                    if not mask[row, place] or int(said[0][row, place]) not in head().ids:
                        continue
                    p = rows.logits(corpus.hidden(0)[row, place]).softmax(-1)
                    q = logits[row, index].softmax(-1)
                    losses.append(float((p * (p / q).log()).sum()))
            total += 0.5**step * sum(losses) / max(1, len(losses))
    assert float(found) == pytest.approx(total / 1.5, rel=1e-4)
    assert float(found) > 0
    with torch.inference_mode():
        half = config.model_copy(update={"precision": "bf16"})
        near = float(Lesson(half, head(), corpus, rows, said).loss(0))
    assert near == pytest.approx(float(found), rel=0.05)
    assert near != float(found)


def test_both_dialects_hold_the_same_head(tmp_path: Path) -> None:
    folder, checkpoint = tmp_path / "draft", tmp_path / "target"
    target().save_pretrained(checkpoint)
    sizes = Architecture.from_config(read_config(checkpoint))
    _save(head(), DraftEagle3(), sizes, checkpoint, folder, LAYERS)
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["model_type"] == "llama"
    assert config["num_hidden_layers"] == 1
    assert config["vocab_size"] == 96
    assert config["draft_vocab_size"] == 32
    assert config["tie_word_embeddings"] is False  # the target ties
    assert config["eagle_aux_hidden_state_layer_ids"] == list(LAYERS)
    tensors = load_file(folder / "model.safetensors")
    width = sizes.hidden
    assert tensors["fc.weight"].shape == (width, 3 * width)
    assert tensors["midlayer.self_attn.k_proj.weight"].shape[1] == 2 * width
    assert tensors["lm_head.weight"].shape == (32, width)
    assert (tensors["d2t"] + torch.arange(32)).tolist() == list(range(0, 96, 3))
    assert tensors["t2d"].nonzero().flatten().tolist() == list(range(0, 96, 3))
    assert tensors["t2d"].dtype is torch.bool
    other = load_file(folder / "speculators" / "model.safetensors")
    assert "layers.0.self_attn.q_proj.weight" in other
    assert speculators_tensors(tensors).keys() == other.keys()
    loaded = load_eagle3(folder, target(), LAYERS)
    for name, parameter in head().named_parameters():
        assert torch.equal(loaded.head.get_parameter(name), parameter)
    assert torch.equal(loaded.head.ids, head().ids)
    with pytest.raises(ModelError, match="no EAGLE-3 head"):
        load_eagle3(checkpoint, target(), LAYERS)
    with pytest.raises(ModelError, match="no tensor of an EAGLE-3 head"):
        speculators_tensors({"model.embed_tokens.weight": tensors["fc.weight"]})


def test_default_features_carry_no_ids() -> None:
    from compressor.formats.eagle3 import flat_config

    assert default_layers(30) == (2, 15, 27)
    assert not [key for key in flat_config({}, 10, 30, (2, 15, 27)) if "eagle" in key]
    named = flat_config({}, 10, 30, (1, 15, 27))
    assert named["eagle_aux_hidden_state_layer_ids"] == [1, 15, 27]
    assert named["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 14, 26]


def test_the_plan_says_when_default_features_are_not_low_to_high() -> None:
    sizes = Architecture.from_config(read_config(resources.builtin_model("tiny")))
    twice, order = DraftEagle3().remarks(sizes)
    assert "vLLM" in twice
    assert "hidden_states [2, 2, 1]" in order
    assert "features: [1, 2, 3]" in order
    assert not DraftEagle3(features=(1, 2, 3)).remarks(sizes)


def test_the_estimated_parameters_are_those_of_the_head() -> None:
    tiny = load_model(resources.builtin_model("tiny"), "cpu", torch.float32)
    sizes = Architecture.from_config(read_config(resources.builtin_model("tiny")))
    config = DraftEagle3(vocab=64)
    made = Eagle3(layer_config(tiny), torch.arange(64), tiny.get_input_embeddings().weight)
    matrices = sum(p.numel() for p in made.parameters() if p.ndim == 2)
    assert config.parameters(sizes) == matrices
