"""Learned masks: what fixed gates compute is what is exported; resumable; refused before work."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.errors import NumericalError, PlanError, TextError
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.model.shape import shape_of
from compressor.numerics.gates import kept_probability
from compressor.plan import make_plan
from compressor.progress import PlainObserver, RichObserver, SilentObserver
from compressor.resources import builtin_model
from compressor.stages import distilling, masking
from compressor.stages.context import StageContext
from compressor.stages.distilling import learned
from compressor.stages.masking import Gates, write_pruned
from compressor.stages.prune_dro import PruneDro
from compressor.team import ALONE
from compressor.types import StageResult
from compressor.verify import verify_result
from tests.helpers import Killed, Killer, checked_run, stage_context
from tests.model.conftest import build
from tests.model.conftest import checkpoints as checkpoints  # noqa: PLC0414 — a fixture

TINY = builtin_model("tiny")
KINDS = ("layers", "kv_heads", "heads", "channels")


@pytest.fixture(scope="module")
def text() -> CalibrationSet:
    return build_batches(CalibrationConfig(samples=20, length=32), load_tokenizer(TINY))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama that reads the built-in model's tokens, small enough to train in seconds."""
    folder = tmp_path_factory.mktemp("small")
    sizes = {"vocab_size": 4096, "max_position_embeddings": 64, "num_hidden_layers": 3}
    build("llama", **sizes).save_pretrained(folder)
    for path in TINY.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


@pytest.fixture(autouse=True)
def few_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distilling, "_HELD", 2)
    monkeypatch.setattr(distilling, "_EVERY", 2)
    build = distilling.build_development

    def short(tokenizer: object, *, longest: int) -> object:
        return build(tokenizer, longest=min(longest, 32))

    monkeypatch.setattr(distilling, "build_development", short)


def context(folder: Path, original: Path, observer=None) -> StageContext:
    return stage_context(folder, observer=observer or SilentObserver(), original=original)


def stage(**options: object) -> PruneDro:
    return PruneDro(**{"tokens": 10 * 4 * 32, "batch": 4, "measure_every": 5, **options})


def prune(
    folder: Path, parent: Path, text: CalibrationSet, chosen: PruneDro, observer=None
) -> StageResult:
    """Run a stage, hold it to its promises and to its plan."""
    return checked_run(chosen, parent, text, context(folder, parent, observer))


@pytest.mark.parametrize(
    "variant",
    ["llama-tied-biased", "qwen3", "gemma3", "phi3", "granite", "olmo2", "gpt2", "gpt_neox"],
)
def test_what_fixed_gates_compute_is_what_is_exported(
    tmp_path: Path, checkpoints: Callable[..., Path], variant: str
) -> None:
    """In fp32, up to the order of sums; one gate more or less would be seen."""
    parent = checkpoints(variant)
    architecture = Architecture.from_config(read_config(parent))
    fixed_heads = variant in ("olmo2", "gpt2", "gpt_neox")
    sizes = {"layers": 1, "channels": 24} | ({} if fixed_heads else {"kv_heads": 1, "heads": 1})
    kinds = tuple(kind for kind in KINDS if kind in sizes)
    student = load_model(parent, dtype=torch.float32)
    target = replace(shape_of(architecture), **sizes)
    gates = Gates(student, architecture, target, kinds)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for logits in gates.logits.values():
            logits.copy_(torch.randn(logits.shape, generator=generator))
        for parameter in student.parameters():  # as if it had learned
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    gates.fix()
    result = write_pruned(parent, architecture, gates, learned(student, ALONE), tmp_path / "out")
    assert result.checkpoint == tmp_path / "out"
    assert not result.added
    verify_result(parent, result)
    ids = torch.randint(3, 90, (2, 12), generator=generator)
    with torch.inference_mode():
        gated = student(ids, use_cache=False).logits
        exported = load_model(tmp_path / "out")(ids, use_cache=False).logits
        torch.testing.assert_close(gated, exported, rtol=0, atol=2e-5 * float(gated.abs().max()))
        plan = gates.plan()
        gates._values["channels"][plan.layers[0], plan.blocks[plan.layers[0]].channels[None][0]] = 0
        mutant = student(ids, use_cache=False).logits
    assert float((mutant - exported).abs().max()) > 1e-3 * float(gated.abs().max())
    left = shape_of(Architecture.from_config(read_config(tmp_path / "out")))
    assert left == target


def test_masks_reach_their_target_and_the_table_is_shown(
    tmp_path: Path, small: Path, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    made: list[Gates] = []
    fix = Gates.fix

    def watched(gates: Gates) -> None:
        if not gates.fixed:
            made.append(gates)
        fix(gates)

    monkeypatch.setattr(Gates, "fix", watched)
    sizes = {"intermediate": 24, "heads": 2}
    chosen = stage(tokens=50 * 4 * 32, measure_every=10, mask_rate=1.0, repeats=99, **sizes)
    result = prune(tmp_path / "out", small, text, chosen, PlainObserver())
    (gates,) = made
    for kind in ("channels", "heads"):
        share = kept_probability(gates.logits[kind].detach()).mean()
        assert float(share) == pytest.approx(0.5, abs=0.08)
        assert float(gates.multipliers[kind].detach().abs().max()) > 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "dro.jsonl").read_text().splitlines()]
    assert [line["update"] for line in lines] == list(range(0, 51, 10))
    assert lines[0]["kept"] > lines[2]["kept"] > lines[-1]["kept"]
    assert lines[-1]["kept"] == pytest.approx(1 - result.notes["share of parameters removed"])
    assert sum(lines[-1]["tokens"].values()) == pytest.approx(50 * 4 * 32)
    assert len(result.mixture) == 6
    shown = capsys.readouterr().err
    assert "update 40/50" in shown
    assert "multilingual" in shown
    (fallback,) = result.fallbacks
    assert "5 measurements are too few for a forecast" in fallback.reason


def states(folder: Path) -> dict[str, torch.Tensor]:
    with safe_open(folder / "training.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_a_killed_training_ends_in_the_same_state(
    tmp_path: Path, small: Path, text: CalibrationSet
) -> None:
    """Killed while gates are learned and again when they are fixed; weights, moments, masks,
    multipliers, mixture and bytes are those of a training that was not."""
    chosen = stage(intermediate=24, layers=2, measure_every=3, settle=0.3)
    whole = prune(tmp_path / "whole", small, text, chosen)
    for steps in (5, 8):
        with pytest.raises(Killed):
            chosen.run(small, text, context(tmp_path / "parts", small, Killer(steps)))
    result = chosen.run(small, text, context(tmp_path / "parts", small))
    assert replace(result, checkpoint=whole.checkpoint) == whole
    for path in sorted((tmp_path / "whole").iterdir()):
        assert path.read_bytes() == (tmp_path / "parts" / path.name).read_bytes(), path.name
    one, other = states(tmp_path / "whole-scratch"), states(tmp_path / "parts-scratch")
    assert {name for name in one if "gates" in name and name.startswith("weight")} == {
        f"weight.gates.{what}.{kind}"
        for what in ("logits", "multipliers")
        for kind in ("layers", "channels")
    }
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_loss_that_is_no_number_stops_and_the_run_goes_on(
    tmp_path: Path, small: Path, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = stage(intermediate=24, tokens=6 * 4 * 32, sampler="static")
    whole = prune(tmp_path / "whole", small, text, chosen)
    real, calls = masking.distance, []

    def broken(*inputs: object) -> torch.Tensor:
        calls.append(1)
        found = real(*inputs)
        return found * float("nan") if len(calls) == 4 else found

    monkeypatch.setattr(masking, "distance", broken)
    with pytest.raises(NumericalError, match="the loss of training step 3 is nan"):
        chosen.run(small, text, context(tmp_path / "parts", small))
    result = chosen.run(small, text, context(tmp_path / "parts", small))
    assert replace(result, checkpoint=whole.checkpoint) == whole


def test_domains_that_differ_by_noise_alone_keep_their_shares(
    tmp_path: Path, small: Path, text: CalibrationSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Placebo: every domain's windows are drawn from one distribution."""
    generator = torch.Generator().manual_seed(11)
    domains = ("code", "docs", "encyclopedia", "multilingual", "prose", "speeches")

    def noise(_: object) -> dict[str, torch.Tensor]:
        return {name: 0.2 + 0.1 * torch.rand(8, generator=generator).double() for name in domains}

    monkeypatch.setattr(distilling.Judge, "measure", noise)
    result = prune(tmp_path / "out", small, text, stage(intermediate=24, measure_every=1))
    assert len(result.mixture) == 11
    assert {tuple(point.shares.values()) for point in result.mixture} == {
        tuple(result.mixture[0].shares.values())
    }


OWN = "mix: default\n    tokens: 40960\n    length: 64\n    windows: "
REFUSED = {
    "illegal width": (f"intermediate: 700\n    multiple: 64\n    {OWN}400", "no multiple of 64"),
    "more heads": (f"heads: 6\n    {OWN}400", "6 heads cannot be kept: the model has 5"),
    "more blocks": (f"layers: 5\n    {OWN}400", "5 layers cannot be kept: the model has 4"),
    "uneven": (f"heads: 3\n    {OWN}400", "320"),
    "nothing": (f"ratio: 0\n    {OWN}400", "nothing goes at this size"),
    "not asked": (OWN + "400", "nothing says how much goes"),
    "no text": (f"ratio: 0.2\n    {OWN}5", "domain 'speeches' gets none of 5 windows"),
    "too often": (f"ratio: 0.2\n    {OWN}20", "'speeches' could be seen .* `repeats` allows 16"),
    "one domain": (f"ratio: 0.2\n    {OWN}400\n    mix: prose-only", "text has prose alone"),
    "batch": (f"ratio: 0.2\n    {OWN}400\n    accumulate: 3", "3 parts do not divide"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_the_plan_refuses_in_a_sentence(case: str, recipe_file) -> None:
    written, sentence = REFUSED[case]
    if "prose-only" in written:
        written = written.replace("mix: default", "mix: prose-only", 1).rpartition("\n")[0]
    recipe = recipe_file(
        f"stages:\n  - method: prune.dro\n    {written}\nexport: [{{format: dense}}]\n"
    )
    with pytest.raises(PlanError, match=sentence) as caught:
        make_plan(recipe, read_config(TINY), "builtin:tiny")
    assert caught.value.problems[0].line >= 2


def test_calibration_text_that_would_repeat_too_often_is_refused(
    recipe_file, tmp_path: Path, text: CalibrationSet
) -> None:
    recipe = recipe_file(
        "calibration: {samples: 20, length: 32}\nstages:\n  - method: prune.dro\n    ratio: 0.2\n"
        "    tokens: 100000\nexport: [{format: dense}]\n"
    )
    with pytest.raises(PlanError, match="'speeches' could be seen"):
        make_plan(recipe, read_config(TINY), "builtin:tiny")
    with pytest.raises(TextError, match="could be seen"):
        stage(ratio=0.2, tokens=100_000).run(TINY, text, context(tmp_path / "out", TINY))
    assert not (tmp_path / "out").exists()


def test_a_table_stands_above_the_bars_until_its_work_ends() -> None:
    observer = RichObserver()
    with observer, observer.task("training", 10):
        for number in (1, 2):
            observer.table("domains", ("domain", "share"), [("prose", f"{number}0 %")])
        drawn = list(observer._progress.get_renderables())
        assert len(drawn) == 2
    assert len(list(observer._progress.get_renderables())) == 1
