"""`quantize.gptq` with `robust: true`, on the built-in model and real text."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compressor import calibration as text
from compressor import resources
from compressor.calibration import CalibrationConfig, CalibrationSet, build_batches
from compressor.evaluation.divergence import log_probabilities
from compressor.model.load import load_model, load_tokenizer
from compressor.numerics.robust import divergence
from compressor.stages.context import StageContext
from compressor.stages.moments import MomentSums
from compressor.stages.quantize_gptq import QuantizeGptq
from compressor.stages.robust import (
    DAMPING,
    SHARE,
    WEIGHT,
    Choice,
    DomainBalance,
    Trial,
    _Bench,
    choose,
    relative_drift,
)
from compressor.stages.rounding import Block, round_model
from compressor.stages.solving import compensated
from compressor.types import BlockRecord, TokenBatch
from tests.helpers import stage_context
from tests.test_resume import RECIPE, at_line, attempt, events, result

TINY = resources.builtin_model("tiny")


@pytest.fixture(autouse=True)
def little_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text, "DEVELOPMENT_WINDOWS", 2)
    monkeypatch.setattr(text, "DEVELOPMENT_LENGTH", 16)


@pytest.fixture(scope="module")
def calibration() -> CalibrationSet:
    config = CalibrationConfig(samples=8, length=32, batch_size=4)
    return build_batches(config, load_tokenizer(TINY))


def held_out() -> tuple[TokenBatch, ...]:
    return text.build_development(load_tokenizer(TINY), longest=512)


def context(folder: Path, records: list[BlockRecord] | None = None) -> StageContext:
    told = (records if records is not None else []).append
    return stage_context(folder / "stage", scratch=folder / "scratch", block_done=told)


def test_pairs_around_the_recipe() -> None:
    assert stage().tried == ((0.1, 0.1 / 3, pytest.approx(0.3)), (0.5, 0.25, 0.75))
    assert stage(damping=0.6, propagate=0).tried == ((0.6, pytest.approx(0.2), 1.0), (0, 0.25))
    assert [stage().tried_blocks(layers) for layers in (1, 4, 32, 80)] == [1, 2, 3, 8]


def stage(**options: Any) -> QuantizeGptq:
    quick = {"bits": 3, "group_size": 64, "grid": "minmax", "sweeps": 0, "robust": True}
    quick |= {"precision": "float32"}
    return QuantizeGptq(**(quick | options))


# ---------------------------------------------------------------------- text and moments


def test_development_text_is_no_calibration_text(calibration: CalibrationSet) -> None:
    batches = held_out()
    assert [set(batch.domains) for batch in batches] == [
        {name} for name in ("code", "docs", "encyclopedia", "multilingual", "prose", "speeches")
    ]
    assert all(batch.input_ids.shape == (2, 16) for batch in batches)
    seen = {tuple(row) for batch in calibration.batches for row in batch.input_ids.tolist()}
    assert not seen & {tuple(row) for batch in batches for row in batch.input_ids.tolist()}
    # The documents themselves are apart, too.
    for domain in calibration.tokens:
        ids = {d.id for d in text.text.calibration_documents(domain, "development")}
        assert not ids & {d.id for d in calibration.documents if d.domain == domain}


@pytest.mark.parametrize("paired", [False, True])
def test_moments_count_every_token_as_often_as_its_domain_says(paired: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(60, 16, generator=generator)
    parent = rows + 0.1 * torch.randn(60, 16, generator=generator)
    domains = torch.randint(3, (60,), generator=generator)
    measured = MomentSums(16, torch.device("cpu"), paired=paired, apart=True)
    for part in (slice(0, 20), slice(20, 60)):
        measured.add(rows[part], parent[part] if paired else None, domains[part])
    ratios = [0.5, 1.0, 2.5]
    found = measured.moments(ratios)
    times = torch.tensor(ratios)[domains][:, None]
    assert found is not None
    expected = 2 / times.sum() * (rows * times).T @ rows
    assert torch.allclose(found.hessian, expected, atol=1e-5)
    assert (found.drift is not None) == paired
    if found.drift is not None:
        drift = 2 / times.sum() * ((parent - rows) * times).T @ rows
        assert torch.allclose(found.drift, drift, atol=1e-5)


def test_drift_is_the_mean_share_over_valid_tokens() -> None:
    original = torch.tensor([[[3.0, 4.0], [1.0, 0.0], [9.0, 9.0]]])
    rounded = torch.tensor([[[3.0, 5.0], [1.0, 1.0], [0.0, 0.0]]])
    mask = torch.tensor([[True, True, False]])
    assert relative_drift(original, rounded, mask).tolist() == pytest.approx([(1 / 25 + 1) / 2])


# ---------------------------------------------------------------------- weights


def test_the_domain_that_drifts_most_counts_most() -> None:
    tokens = {"code": 100, "prose": 300, "user": 100}
    balance = DomainBalance(tokens, (), 0.1)
    assert set(balance.ratios.values()) == {1.0}
    balance._set({"code": [0.5, 0.52, 0.49], "prose": [0.1, 0.11, 0.1], "docs": [9.0, 9.0, 9.0]})
    ratios = balance.ratios
    assert ratios["code"] > 1.3
    assert ratios["prose"] < 1
    assert ratios["user"] == pytest.approx(1)  # there is no held-out text of it
    total = sum(ratios[name] * count for name, count in tokens.items())
    assert total == pytest.approx(500)


def test_noise_moves_nothing() -> None:
    balance = DomainBalance({"code": 100, "prose": 100}, (), 0.1)
    balance._set({"code": [0.1, 0.9, 0.3], "prose": [0.5, 0.2, 0.5]})
    assert balance.ratios == {"code": 1.0, "prose": 1.0}


def test_notes_carry_all_that_a_resumed_stage_needs() -> None:
    balance = DomainBalance({"code": 100, "prose": 300}, (), 0.1)
    windows = {"code": [0.5, 0.52, 0.49], "prose": [0.1, 0.11, 0.1]}
    balance.begin(Choice({DAMPING: 0.3, SHARE: 0.25}, Trial(windows, windows)))
    assert balance.ratios["code"] > 1
    weights = dict(zip(balance.domains, balance._weights.tolist(), strict=True))
    notes = balance._notes | {WEIGHT + name: value for name, value in weights.items()}
    other = DomainBalance({"code": 100, "prose": 300}, (), 0.1)
    other.take_up(notes)
    assert other.ratios == balance.ratios
    assert other.choice == {"damping": 0.3, "propagate": 0.25}
    assert other._notes == balance._notes


# ---------------------------------------------------------------------- options


def test_only_what_beats_the_recipe_beyond_noise_is_taken() -> None:
    own = Trial({"code": [1.0, 1.1, 0.9, 1.0], "prose": [0.2] * 4}, {})
    clear = Trial({"code": [0.9, 1.0, 0.8, 0.91], "prose": [0.2] * 4}, {})
    noisy = Trial({"code": [0.2, 1.9, 0.1, 1.6], "prose": [0.2] * 4}, {})
    elsewhere = Trial({"code": [0.5] * 4, "prose": [2.0] * 4}, {})
    assert clear.beats(own)
    assert not noisy.beats(own)
    assert not elsewhere.beats(own)
    assert not own.beats(own)


def test_a_trial_measures_the_model_it_stands_for(
    calibration: CalibrationSet, tmp_path: Path
) -> None:
    """Its first blocks rounded, the rest as they were: against that model in transformers."""
    batches = held_out()
    balance = DomainBalance(calibration.tokens, batches, 0.1)
    bench = _Bench(stage(), TINY, calibration.batches, balance, context(tmp_path / "trial"))
    found = bench.trials([(0.1, 0.5)])[0.1, 0.5]

    class Still(DomainBalance):
        def settle(self, block: Block, original: Block | None) -> dict[str, float]:
            return {}

    plain = stage(targets=("model.layers.0.*", "model.layers.1.*"))
    outcome = round_model(
        plain, compensated(plain), TINY, calibration.batches, context(tmp_path / "whole"),
        sublayers=True, reference=True, balance=Still(calibration.tokens, batches, 0),
    )  # fmt: skip
    models = [load_model(folder, dtype=torch.float32) for folder in (TINY, outcome.checkpoint)]

    def logits(model: Any, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return log_probabilities(model(batch.input_ids, use_cache=False).logits.clone())

    for batch in batches:
        p, q = (logits(model, batch) for model in models)
        kl = (p.exp() * (p - q)).sum(-1).mean(1)
        assert found.kl[batch.domains[0]] == pytest.approx(kl.tolist(), rel=1e-3)
    assert not (tmp_path / "trial" / "scratch" / "trial").exists()


def test_robust_rounding_on_the_built_in_model(
    calibration: CalibrationSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(QuantizeGptq, "tried", property(lambda _: ((0.1, 0.3), (0.5, 0.25))))
    records: list[BlockRecord] = []
    outcome = stage().run(TINY, calibration, context(tmp_path, records))
    assert len(records) == 4
    base = torch.tensor([calibration.tokens[name] / 256 for name in sorted(calibration.tokens)])
    for record in records:
        weights = [record.notes[f"robust.weight.{name}"] for name in sorted(calibration.tokens)]
        assert divergence(torch.tensor(weights), base) <= 0.1 + 1e-6
    first, last = records[0].notes, records[-1].notes
    tried = [name for name in first if name.startswith("robust.kl.")]
    assert len(tried) == 3
    assert last.items() <= outcome.notes.items()
    assert outcome.notes["robust.damping"] in (0.1, 0.3)
    # Without freedom it is plain GPTQ with moments summed domain by domain.
    still = stage(radius=0)
    monkeypatch.setattr(QuantizeGptq, "tried", property(lambda _: ((0.1,), (0.5,))))
    fixed = still.run(TINY, calibration, context(tmp_path / "fixed"))
    plain = stage(robust=False).run(TINY, calibration, context(tmp_path / "plain"))
    assert fixed.metrics[0].loss == pytest.approx(plain.metrics[0].loss, rel=1e-3)
    for one, two in zip(fixed.metrics, plain.metrics, strict=True):
        assert one.loss == pytest.approx(two.loss, rel=0.1)


def test_one_domain_has_nothing_to_weigh(tmp_path: Path) -> None:
    config = CalibrationConfig(mix="prose-only", samples=4, length=32, batch_size=4)
    prose = build_batches(config, load_tokenizer(TINY))
    balance = DomainBalance(prose.tokens, held_out(), 0.1)
    choice = choose(stage(targets=("down",)), TINY, prose.batches, balance, context(tmp_path))
    assert len(choice.trial.kl) == 6  # judged on all domains nevertheless
    balance.begin(choice)
    assert balance.ratios == {"prose": 1.0}


def test_the_plan_states_what_it_costs(tmp_path: Path) -> None:
    from compressor import machine
    from compressor.cost import block_memory
    from compressor.model.architecture import Architecture
    from compressor.model.files import read_config
    from compressor.plan import make_plan
    from compressor.recipe import load_recipe

    plans = {}
    for robust in ("false", "true"):
        path = tmp_path / f"{robust}.yaml"
        path.write_text(RECIPE.replace("    bits: 4\n", f"    robust: {robust}\n"))
        plan = make_plan(load_recipe(path), read_config(TINY), "builtin:tiny")
        plans[robust] = plan.stages[0]
    tiny = Architecture.from_config(read_config(TINY))
    held_out = 6 * 2 * 16  # as `little_text` has it
    walking = {"standing": True, "activation_bytes": 2 if machine.multiplies_bf16() else 4}
    need = block_memory(tiny, 64 + held_out, reference=True, domains=6, **walking)
    assert plans["true"].peak_bytes == need
    assert plans["true"].flops == pytest.approx(plans["false"].flops * (1 + 5 * 2 / 4))
    (remark,) = plans["true"].remarks
    assert "5 pairs" in remark
    assert "2 of 4 blocks" in remark
    assert not plans["false"].remarks
    widths = [matrices[0].shape[1] for matrices in tiny.groups(0).values()]
    apart = block_memory(tiny, 64, reference=True, domains=6)
    more = 2 * 4 * 6 * sum(width**2 for width in widths)
    assert apart - block_memory(tiny, 64, reference=True) == more


# ---------------------------------------------------------------------- killed


def briefly(then: Any = None, *arguments: Any) -> None:
    """In the process of an attempt: little held-out text, few trials, then the trap."""
    text.DEVELOPMENT_WINDOWS, text.DEVELOPMENT_LENGTH = 2, 16  # type: ignore[misc]
    QuantizeGptq.tried = property(lambda _: ((0.1, 0.3), (0.5,)))  # type: ignore[assignment]
    if then:
        then(*arguments)


def test_killed_within_a_block(tmp_path: Path) -> None:
    recipe = RECIPE.replace("    bits: 4\n", "    bits: 4\n    robust: true\n    sweeps: 0\n")
    recipe = recipe.replace("samples: 2", "samples: 6")
    recipe = recipe[: recipe.index("export:")].replace("length: 64", "length: 16")
    (tmp_path / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert attempt(tmp_path / "whole", briefly) == 0
    folder = tmp_path / "killed"
    # Lines of an attempt: run_started, evaluated, block 0, block 1, ...
    assert attempt(folder, briefly, at_line, 4, "torn") == -signal.SIGKILL
    assert events(folder).count("block_done") == 1
    assert attempt(folder, briefly) == 0
    assert events(folder).count("block_done") == 4
    assert result(folder) == result(tmp_path / "whole")
    notes = [e["record"]["notes"] for e in _journal(folder) if e["event"] == "block_done"]
    assert notes[0]["robust.damping"] == notes[3]["robust.damping"]
    assert notes == [
        e["record"]["notes"] for e in _journal(tmp_path / "whole") if e["event"] == "block_done"
    ]


def _journal(folder: Path) -> list[dict[str, Any]]:
    from compressor.journal import Journal

    return Journal(folder / "journal.jsonl").events
