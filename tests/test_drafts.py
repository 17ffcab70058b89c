"""A recipe with a draft, end to end on the built-in model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from compressor import resources
from compressor.decoding.binding import (
    fingerprint,
    read_binding,
    require_target,
    tokenizer_sha256,
)
from compressor.decoding.cached import CachedModel
from compressor.decoding.corpus import Corpus, Head
from compressor.decoding.decode import Limits, decode
from compressor.decoding.load import load_draft
from compressor.decoding.proposals import Chain
from compressor.decoding.standalone import chosen_blocks, standalone
from compressor.engine import run_recipe
from compressor.errors import ModelError, PlanError
from compressor.formats import gguf
from compressor.formats.shards import CheckpointReader
from compressor.journal import Journal
from compressor.model.load import load_model, read_config
from compressor.plan import make_plan
from compressor.progress import SilentObserver
from compressor.stages.draft_eagle3 import DraftEagle3
from compressor.stages.draft_standalone import DraftStandalone
from compressor.stages.drafting import _less_text, _without_template
from compressor.types import TokenBatch
from tests import runs
from tests.model.conftest import build

RECIPE = """\
calibration: {samples: 8, length: 64, batch_size: 4}
stages:
  - method: quantize.rtn
    bits: 4
    group_size: 64
  - method: draft.standalone
    tokens: 512
    length: 32
    prompt: 8
    steps: 12
    probes: 2
    intermediate: 416
    on_policy: 0.25
    continued: 8
    drafted: 3
    prompts: 1
    new_tokens: 8
  - method: draft.eagle3
    vocab: 64
    ttt_steps: 2
    tokens: 512
    length: 32
    prompt: 8
    steps: 12
    probes: 3
    drafted: 2
    prompts: 1
    new_tokens: 8
    tree_nodes: 6
    minutes: 60
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
export: [{format: compressed-tensors}, {format: gguf}]
"""
STAGE = "02-draft.standalone"
EAGLE = "03-draft.eagle3"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.run(tmp_path_factory.mktemp("drafts"), RECIPE).folder


def test_the_report_tells_what_the_draft_is_worth(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    draft, _ = report["drafts"]
    found = draft["measurement"]
    assert draft["target"] == "01-quantize.rtn"
    assert set(found["domains"]) == set(report["evaluations"]["base"]["domains"])
    for domain in found["domains"].values():
        shares = domain["greedy"]["by_position"]
        assert shares == sorted(shares, reverse=True)
        assert domain["greedy"]["length"] == pytest.approx(1 + sum(shares))
    first, second = found["speeds"]
    assert (first["batch"], second["batch"]) == (1, 4)
    length = 1 + sum(found["greedy"]["by_position"][: first["drafted"]])
    cost = first["drafted"] * first["draft_cost"] + first["verify_costs"][first["drafted"] - 1]
    assert first["predicted"] == pytest.approx(length / cost)
    assert first["assisted"] > 0
    assert first["tree"] is None
    assert found["identical"] == found["prompts"] or found["largest_margin"] < 1e-3
    assert draft["worthwhile"] == (first["measured"] >= 1.05)
    points = draft["curve"]["points"]
    assert [point["tokens"] for point in points] == [256 * 6, 256 * 12]
    assert draft["curve"]["fit"]["low"] is None  # two points have no interval
    assert (draft["outlook"] is None) == draft["worthwhile"]
    no_gain = any(w["id"] == f"no-speed-up-{STAGE}" for w in report["warnings"])
    assert no_gain == (not draft["worthwhile"])
    assert report["headline"] == "01-quantize.rtn"
    assert [variant["id"] for variant in report["variants"]] == ["base", "01-quantize.rtn"]
    assert "Draft, 1 block" in (run / "report.html").read_text()


def test_a_second_draft_stands_beside_the_first(run: Path) -> None:
    report = json.loads((run / "report.json").read_text())
    first, draft = report["drafts"]
    assert first["path"] == "deliverable/draft"
    assert draft["path"] == f"deliverable/{EAGLE}"
    assert draft["target_sha256"] == first["target_sha256"]
    assert draft["stage"]["notes"]["draft_vocabulary"] == 64
    assert 0.3 < draft["stage"]["notes"]["draft_vocabulary_coverage"] < 1
    speed = draft["measurement"]["speeds"][0]
    assert speed["tree"] > 0
    assert speed["assisted"] is None
    assert draft["measurement"]["tree_length"] >= 1
    out = run / draft["path"]
    config = json.loads((out / "speculators" / "config.json").read_text())
    (proposal,) = config["speculators_config"]["proposal_methods"]
    assert proposal["speculative_tokens"] == speed["drafted"]


def test_a_standalone_draft_stands_beside_a_gguf_target(run: Path) -> None:
    """Weight by weight the checkpoint; llama.cpp decodes with it in `tests/engines`."""
    report = json.loads((run / "report.json").read_text())
    draft, eagle = report["drafts"]
    assert draft["gguf"] == "deliverable/draft/gguf/model.gguf"
    assert eagle["gguf"] == f"deliverable/{EAGLE}/gguf/model.gguf"
    assert f"--spec-type draft-eagle3 -md {eagle['gguf']} " in eagle["load_snippets"]["llama.cpp"]
    most = draft["measurement"]["speeds"][0]["drafted"]
    line = (
        "llama-server -m deliverable/gguf/model.gguf --spec-type draft-simple "
        f"-md deliverable/draft/gguf/model.gguf --spec-draft-n-max {most}"
    )
    assert draft["load_snippets"] == {"llama.cpp": line}
    assert line in (run / "README.md").read_text()
    assert line in (run / "report.html").read_text()
    dense = CheckpointReader(run / "deliverable" / "draft")
    stored = dict(gguf.read(run / "deliverable" / "draft" / "gguf"))
    assert set(stored) == set(dense)
    assert all(torch.equal(value.to(dense.dtype(n)), dense[n]) for n, value in stored.items())
    config, _ = gguf.described(run / "deliverable" / "draft" / "gguf")
    target, _ = gguf.described(run / "deliverable" / "gguf")
    assert config["num_hidden_layers"] == 1
    assert config["vocab_size"] == target["vocab_size"]  # as llama.cpp asks of a draft


def test_a_time_box_is_told(run: Path) -> None:
    """One that is not reached ends nothing."""
    report = json.loads((run / "report.json").read_text())
    assert report["drafts"][1]["stage"]["notes"]["training_steps"] == 12
    assert not report["fallbacks"]
    box = DraftEagle3(steps=50, writing_minutes=3.0)
    assert not _less_text(box, box.rows)
    (fallback,) = _less_text(box, 64)
    assert fallback.reason == "3 minutes were over after 64 of 312 rows"


def test_requests_without_a_chat_template_are_told(tmp_path: Path) -> None:
    base = resources.builtin_model("tiny")
    assert not _without_template(DraftEagle3(), base)
    (fallback,) = _without_template(DraftEagle3(requests="own"), base)
    assert "chat template" in fallback.reason


def test_the_draft_is_a_plain_checkpoint_with_the_best_number_of_tokens(run: Path) -> None:
    out = run / "deliverable" / "draft"
    report = json.loads((run / "report.json").read_text())
    settings = transformers.GenerationConfig.from_pretrained(out)
    assert (
        settings.num_assistant_tokens == report["drafts"][0]["measurement"]["speeds"][0]["drafted"]
    )
    assert settings.num_assistant_tokens_schedule == "constant"
    assistant = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert assistant.config.num_hidden_layers == 1
    assert assistant.config.intermediate_size == 416
    target = load_model(run / "deliverable" / "compressed-tensors", "cpu", torch.float32)
    ids = torch.tensor([[5, 6, 7]])
    options: dict[str, Any] = {
        "attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False,
        "pad_token_id": 0,
    }  # fmt: skip
    plain = target.generate(ids, **options)
    assisted = target.generate(ids, assistant_model=assistant.float(), **options)
    assert torch.equal(plain, assisted)


def test_a_draft_is_bound_to_its_target_packed_or_dense(run: Path) -> None:
    draft = run / "deliverable" / "draft"
    dense, packed = (
        load_model(run / place, "cpu", torch.float32)
        for place in ("stages/01-quantize.rtn", "deliverable/compressed-tensors")
    )
    tokenizer = tokenizer_sha256(run / "stages/01-quantize.rtn")
    assert fingerprint(dense) == fingerprint(packed) == read_binding(draft).target_sha256
    require_target(draft, packed, tokenizer)
    original = load_model(resources.builtin_model("tiny"), "cpu", torch.float32)
    with pytest.raises(ModelError, match="distilled against weights"):
        require_target(draft, original, tokenizer)
    with pytest.raises(ModelError, match="another tokenizer"):
        require_target(draft, packed, "0" * 64)
    with pytest.raises(ModelError, match="it is no draft"):
        read_binding(run)


@pytest.mark.parametrize("place", ["draft", EAGLE])
def test_a_delivered_draft_speeds_up_the_delivered_target(run: Path, place: str) -> None:
    packed = load_model(run / "deliverable" / "compressed-tensors", "cpu", torch.float32)
    tokenizer = tokenizer_sha256(run / "deliverable" / "compressed-tensors")
    draft = load_draft(run / "deliverable" / place, packed, tokenizer)
    target, prompts = CachedModel(packed, draft.layers), [[5, 6, 7], [8, 9]]
    plain = decode(target, prompts, Limits(12))
    assert decode(target, prompts, Limits(12), draft=draft, shape=Chain(2)).tokens == plain.tokens
    with pytest.raises(ModelError, match="another tokenizer"):
        load_draft(run / "deliverable" / place, packed, None)


def test_the_same_run_again_does_nothing_and_a_lost_draft_is_the_same(
    run: Path, tmp_path: Path
) -> None:
    """Everything after the draft's stage is repeated from its checkpoint; bytes stay."""
    from compressor.recipe import load_recipe

    copy = tmp_path / "out"
    shutil.copytree(run, copy)
    before = {path.name: path.read_bytes() for path in (copy / "stages" / STAGE).iterdir()}
    journal = copy / "journal.jsonl"
    kept = [line for line in journal.read_text().splitlines() if STAGE not in line]
    journal.write_text("\n".join(kept) + "\n")
    shutil.rmtree(copy / "stages" / STAGE)
    run_recipe(load_recipe(run / "recipe.yaml"), "builtin:tiny", copy)
    after = {path.name: path.read_bytes() for path in (copy / "stages" / STAGE).iterdir()}
    assert before == after
    events = [event["event"] for event in Journal(copy / "journal.jsonl").events]
    assert events.count("draft_measured") == 2  # one of the two drafts again


def test_a_lost_measurement_is_made_again(run: Path, tmp_path: Path) -> None:
    from compressor.recipe import load_recipe

    copy = tmp_path / "out"
    shutil.copytree(run, copy)
    lost = copy / "evaluations" / f"{STAGE}.json"
    before = json.loads(lost.read_bytes())
    lost.unlink()
    run_recipe(load_recipe(run / "recipe.yaml"), "builtin:tiny", copy)
    again = json.loads(lost.read_bytes())
    assert again["domains"] == before["domains"]


def test_the_plan_refuses_what_cannot_be_drafted(recipe_file: Any) -> None:
    config = read_config(resources.builtin_model("tiny"))
    for override, message in (
        ("stages.1.layers=4", "no faster than its target of 4"),
        ("stages.1.prompt=32", "leaves nothing of rows of 32"),
        ("stages.1.length=600", "reads at most 512"),
        ("stages.1.intermediate=900", "has 832 channels, not 900"),
        ("stages.1.continued=600", "lower `continued`"),
        ("stages.2.features=[1,2,4]", "not all before the last block"),
        ("stages.2.vocab=5000", "knows 4096 tokens, not 5000"),
    ):
        with pytest.raises(PlanError, match=message):
            make_plan(recipe_file(RECIPE, override), config, "tiny")
    plan = make_plan(recipe_file(RECIPE), config, "tiny")
    assert plan.stages[1].matrices == 0
    assert plan.stages[1].seconds > 0


def test_before_training_it_is_the_targets_first_block() -> None:
    """Only if nothing was cut out of it."""
    target = build("llama")
    before = DraftStandalone(layers=1).untrained(target, Path())
    found = before.model.model.model.layers[0].mlp.down_proj.weight
    assert torch.equal(found, target.model.layers[0].mlp.down_proj.weight)
    assert DraftStandalone(layers=1, intermediate=8).untrained(target, Path()) is None


def test_chosen_blocks() -> None:
    assert chosen_blocks("first", 3, 12) == (0, 1, 2)
    assert chosen_blocks("ends", 3, 12) == (0, 1, 11)
    assert chosen_blocks("ends", 1, 12) == (11,)
    assert chosen_blocks("even", 1, 12) == (0,)
    assert chosen_blocks("even", 4, 12) == (0, 4, 7, 11)
    assert chosen_blocks("ends", 4, 4) == (0, 1, 2, 3)


@pytest.mark.parametrize("variant", ["llama-tied-biased", "gemma2", "qwen2", "gpt2", "smollm3"])
def test_all_blocks_copied_are_the_target(variant: str) -> None:
    target = build(variant)
    copy = standalone(target, (0, 1))
    ids = torch.tensor([[5, 6, 7, 8]])
    torch.testing.assert_close(copy(ids).logits, target(ids).logits)
    one = standalone(target, (1,))
    assert one.config.num_hidden_layers == 1
    found, wanted = (dict(model.named_parameters()) for model in (one, target))
    for name, parameter in found.items():
        source = name.replace("layers.0.", "layers.1.").replace(".h.0.", ".h.1.")
        assert torch.equal(parameter, wanted[source])


@pytest.mark.parametrize("variant", ["llama", "granite", "gemma2", "qwen2-tied", "gpt2"])
def test_cached_states_and_head_give_the_logits_of_a_fresh_forward(
    variant: str, tmp_path: Path
) -> None:
    """Batched and padded, stored in half precision, against every row by itself."""
    target = build(variant)
    rows = [[5, 6, 7, 8, 9], [10, 11, 12]]
    ids = torch.tensor([rows[0], [*rows[1], 0, 0]])
    mask = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    corpus = Corpus(
        target, [TokenBatch(ids, mask, ("a", "b"))], (0, 1), tmp_path, 0, SilentObserver()
    )
    some = torch.tensor([3, 90, 17])
    head = Head.of(target).rows(some)
    for place, row in enumerate(rows):
        with torch.inference_mode():
            fresh = target(torch.tensor([row]), output_hidden_states=True)
        states = torch.cat(fresh.hidden_states[:2], -1)[0]
        kept = corpus.features(0)[place, : len(row)]
        torch.testing.assert_close(kept, states, rtol=1e-3, atol=1e-3)
        logits = head.logits(corpus.hidden(0)[place, : len(row)])
        torch.testing.assert_close(logits, fresh.logits[0][:, some], rtol=5e-3, atol=5e-3)
    assert corpus.tokens == 8
