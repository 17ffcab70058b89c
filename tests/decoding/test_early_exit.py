"""A model that drafts for itself: lossless, one cache, nothing computed twice."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressor import resources
from compressor.decoding.cached import CachedModel
from compressor.decoding.decode import Limits, decode, first_difference, margin
from compressor.decoding.early_exit import EarlyExitDraft, TrackedExitDraft
from compressor.decoding.proposals import Chain, Tree
from compressor.errors import ModelError, PlanError
from compressor.model.load import load_model
from compressor.numerics.speculative import Sampling
from compressor.plan import make_plan
from tests import runs
from tests.model.conftest import build

FAMILIES = ["llama", "qwen2", "gpt2", "gemma2", "mixtral", "granite", "olmo2", "opt"]
PROMPTS = [[5, 9, 30], [7, 8, 22, 41, 3], [60]]
TIE = 1e-3


@cache
def tiny() -> Any:
    return load_model(resources.builtin_model("tiny"), "cpu", torch.float32)


@pytest.mark.parametrize("variant", FAMILIES)
def test_what_left_early_is_finished_to_the_same_logits(variant: str) -> None:
    """Two tokens leave after one block of two; the pass over them and one more ends the same."""
    model = build(variant)
    cached, whole = CachedModel(model, (1,)), CachedModel(model, (1,))
    prompt, tokens = torch.tensor([PROMPTS[2]]), torch.tensor([[20, 21, 22]])
    for one in (cached, whole):
        one.start(1)
        one.forward(prompt)
        one.commit([[0]])
    for token in (0, 1):
        early = cached.leave_early(tokens[:, token : token + 1], 1)
    lengths = [layer.get_seq_length() for layer in cached.cache.layers]
    assert lengths == [3, 1]
    found, wanted = cached.forward(tokens), whole.forward(tokens)
    torch.testing.assert_close(found.logits, wanted.logits, rtol=1e-4, atol=1e-5)
    assert found.features is not None
    assert wanted.features is not None
    torch.testing.assert_close(found.features, wanted.features, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(early[0, 0], wanted.logits[0, 1], atol=1e-3)
    assert "forward" not in vars(cached.blocks[0])
    for one in (cached, whole):
        one.commit([[0, 1]])
    after = [one.forward(torch.tensor([[30]])).logits for one in (cached, whole)]
    torch.testing.assert_close(after[0], after[1], rtol=1e-4, atol=1e-5)


def test_logits_of_an_exit_are_those_of_a_model_without_the_other_blocks() -> None:
    model, short = build("llama"), build("llama")
    short.model.layers = short.model.layers[:1]
    cached = CachedModel(model)
    cached.start(1)
    cached.forward(torch.tensor([[5, 6, 7]]))
    cached.commit([range(3)])
    found = torch.cat([cached.leave_early(torch.tensor([[t]]), 1) for t in (8, 9)], 1)
    with torch.inference_mode():
        wanted = short(torch.tensor([[5, 6, 7, 8, 9]]), use_cache=False).logits[:, 3:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_other_tokens_than_those_that_left_are_computed_anew() -> None:
    model = build("llama")
    cached = CachedModel(model)
    cached.start(1)
    cached.forward(torch.tensor([[5, 6, 7]]))
    cached.commit([range(3)])
    cached.leave_early(torch.tensor([[8]]), 1)
    found = cached.forward(torch.tensor([[9]])).logits
    with torch.inference_mode():
        wanted = model(torch.tensor([[5, 6, 7, 9]]), use_cache=False).logits[:, -1:]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    cached.commit([[0]])
    cached.leave_early(torch.tensor([[8]]), 1)
    cached.commit([[]])
    assert {layer.get_seq_length() for layer in cached.cache.layers} == {4}


def drafts() -> dict[str, Any]:
    return {
        "exit-1": EarlyExitDraft(1),
        "exit-3": EarlyExitDraft(3),
        "tracked": TrackedExitDraft((1, 2, 3), (0.95, 0.5, 0.5)),
    }


@cache
def plainly(rows: int, start: int) -> Any:
    return decode(CachedModel(tiny()), PROMPTS[start : start + rows], Limits(20))


@pytest.mark.parametrize("name", ["exit-1", "exit-3", "tracked"])
@pytest.mark.parametrize("shape", [Chain(1), Chain(4), Tree(3, 2, 5)], ids=str)
@pytest.mark.parametrize("rows", [1, 3])
def test_greedy_text_is_that_of_plain_decoding(name: str, shape: Any, rows: int) -> None:
    draft = drafts()[name]
    target = CachedModel(tiny(), draft.layers)
    for start in range(0, 3, rows):
        prompts = PROMPTS[start : start + rows]
        plain = plainly(rows, start)
        found = decode(target, prompts, Limits(20), draft=draft, shape=shape)
        for prompt, mine, theirs in zip(prompts, found.tokens, plain.tokens, strict=True):
            place = first_difference(mine, theirs)
            assert len(mine) == len(theirs) == 20
            assert place is None or margin(CachedModel(tiny()), [*prompt, *mine[:place]]) < TIE
        blocks = [block for row in found.blocks for block in row]
        assert any(block.proposed for block in blocks)


def test_a_target_that_ignores_its_last_block_accepts_everything() -> None:
    """And a mutant that verifies with what the exit said would look like this always."""
    model = build("llama")
    last = model.model.layers[1]
    last.self_attn.o_proj.weight.data.zero_()
    last.mlp.down_proj.weight.data.zero_()
    found = decode(CachedModel(model), PROMPTS, Limits(21), draft=EarlyExitDraft(1), shape=Chain(4))
    assert {block.emitted for row in found.blocks for block in row} == {5}
    model = build("llama")
    model.model.layers[1].mlp.down_proj.weight.data.mul_(50)
    found = decode(CachedModel(model), PROMPTS, Limits(21), draft=EarlyExitDraft(1), shape=Chain(4))
    assert any(block.accepted < block.proposed for row in found.blocks for block in row)


def test_sampled_text_comes_from_the_target() -> None:
    """With a target whose exit is wrong everywhere, tokens still have the target's support."""
    found = decode(
        CachedModel(tiny()), PROMPTS, Limits(16), draft=EarlyExitDraft(1), shape=Chain(3),
        sampling=Sampling(1.0, top_k=1), seed=3,
    )  # fmt: skip
    plain = decode(CachedModel(tiny()), PROMPTS, Limits(16))
    assert found.tokens == plain.tokens  # top-1 leaves nothing to chance


def test_the_tracked_choice_leaves_an_exit_that_is_never_right() -> None:
    """It begins at exit 1, believed to be right; what it sees makes it stop proposing there."""
    model = build("llama")
    for name in ("o_proj", "q_proj"):
        getattr(model.model.layers[0].self_attn, name).weight.data.mul_(3)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(200)
    draft = TrackedExitDraft((1,), (0.99,))
    found = decode(CachedModel(model, (1,)), PROMPTS[:1], Limits(40), draft=draft, shape=Chain(4))
    proposed = [block.proposed for block in found.blocks[0]]
    accepted = sum(block.accepted for block in found.blocks[0][-10:])
    assert proposed[0] == 4
    assert accepted == 0
    assert proposed[-1] == 0


def test_an_exit_that_is_not_there_is_refused() -> None:
    for exit_ in (0, 2):
        with pytest.raises(ModelError, match="of 2"):
            decode(CachedModel(build("llama")), [[5]], Limits(2), draft=EarlyExitDraft(exit_))


RECIPE = """\
calibration: {samples: 4, length: 64, batch_size: 4}
stages:
  - {method: quantize.rtn, bits: 8, group_size: 64}
  - method: draft.early_exit
    exits: [1, 3]
    tokens: 128
    drafted: 3
    prompts: 1
    new_tokens: 12
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
export: [{format: compressed-tensors}]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run(tmp_path_factory.mktemp("exits"), RECIPE).folder


def test_the_report_tells_where_to_exit(run: Path) -> None:
    (draft,) = json.loads((run / "report.json").read_text())["drafts"]
    found = draft["measurement"]
    assert [trial["exit"] for trial in found["exits"]] == [1, 3]
    best = max(found["exits"], key=lambda trial: trial["predicted"])
    assert found["exit"] == best["exit"]
    assert found["untrained"] is None
    assert found["tracked"]["blocks"] > 0
    speed = found["speeds"][0]
    assert speed["tracked"] > 0
    assert speed["assisted"] > 0
    assert set(speed["domains"]) <= set(found["domains"])
    assert all(domain["measured"] > 0 for domain in speed["domains"].values())
    assert found["identical"] == found["prompts"] or found["largest_margin"] < TIE
    notes = draft["stage"]["notes"]
    assert 0 < notes["agreement_after_1"] < notes["agreement_after_3"] < 1


def test_transformers_exits_early_with_the_delivered_settings(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    found = report["drafts"][0]["measurement"]
    settings = transformers.GenerationConfig.from_pretrained(run / "deliverable" / "draft")
    assert settings.assistant_early_exit == found["exit"]
    assert settings.num_assistant_tokens == found["speeds"][0]["drafted"]
    target = transformers.AutoModelForCausalLM.from_pretrained(
        run / "deliverable" / "compressed-tensors", dtype=torch.float32
    )
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 24, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    plain = target.generate(ids, **options)
    early = {
        "assistant_early_exit": settings.assistant_early_exit,
        "num_assistant_tokens": settings.num_assistant_tokens,
    }
    assert torch.equal(target.generate(ids, **options, **early), plain)


def test_the_plan_refuses_exits_that_are_not_there(recipe_file: Any) -> None:
    from compressor.model.load import read_config

    config = read_config(resources.builtin_model("tiny"))
    for exits in ("[0]", "[4]", "[2,1]", "[2,2]"):
        with pytest.raises(PlanError, match="not ascending places"):
            make_plan(recipe_file(RECIPE, f"stages.1.exits={exits}"), config, "tiny")
