"""What the benchmarks of drafts compute and keep."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

from compressor import resources
from compressor.calibration import CalibrationConfig, build_batches
from compressor.model.load import load_tokenizer
from compressor.numerics.speculative import best_drafted, predicted_costs, products_share
from compressor.progress import SilentObserver
from compressor.stages.quantize_rtn import QuantizeRtn

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(autouse=True)
def beside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scripts import each other by name, as when they are started from their folder."""
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])


def test_a_difference_has_the_prompts_paired() -> None:
    from drafting import difference, per_pass

    one = [[3, 3, 3], [1, 1], [2, 2, 2, 2]]
    assert per_pass(one) == pytest.approx(19 / 9)
    assert difference(one, one) == (0.0, 0.0, 0.0)
    better = [[token + 1 for token in row] for row in one]
    gain, low, high = difference(better, one)
    assert (gain, low, high) == pytest.approx((1.0, 1.0, 1.0))  # prompts cancel out
    gain, low, high = difference(one, [[2, 2], [2, 2], [2]])
    assert low < gain < high


def test_what_is_finished_is_not_done_again(tmp_path: Path) -> None:
    from drafting import finished

    target = resources.builtin_model("tiny")
    calibration = build_batches(CalibrationConfig(samples=1, length=64), load_tokenizer(target))
    stage = QuantizeRtn(bits=8, group_size=64)
    made = [
        finished(stage, target, calibration, tmp_path / "made", SilentObserver()) for _ in range(2)
    ]
    assert made[0] == made[1] == tmp_path / "made"
    assert not (tmp_path / "made.work").exists()
    before = (made[0] / "config.json").stat().st_mtime_ns
    finished(stage, target, calibration, tmp_path / "made", SilentObserver())
    assert (made[0] / "config.json").stat().st_mtime_ns == before


def test_the_table_compares_the_right_draft_with_the_other() -> None:
    from draft_targets import HEATS, NAMES, report

    rows = {"original": [[2, 2], [2, 2]], "quantized": [[3, 3], [3, 3]]}
    cells = {
        (draft, target, heat): {"rows": rows[draft]}
        for draft in NAMES
        for target in NAMES
        for heat in HEATS
    }
    options = argparse.Namespace(
        model="m", kind="standalone", bits=4, tokens=1, steps=1, drafted=5, prompts=1, new_tokens=8
    )
    *_, original, _, quantized, _ = report(options, cells)
    assert original == "| original | 0 | 2.000 | 3.000 | -1.000 (-1.000 to -1.000) |"
    assert quantized == "| quantized | 0 | 2.000 | 3.000 | +1.000 (+1.000 to +1.000) |"


def test_prompts_are_questions_in_the_models_own_form() -> None:
    from drafts_smollm2 import CHAT, CODE, chat_prompts

    tokenizer = load_tokenizer(resources.builtin_model("tiny"))
    found = chat_prompts(tokenizer, 3)
    assert {name: len(prompts) for name, prompts in found.items()} == {"chat": 3, "code": 3}
    assert CHAT[0] in tokenizer.decode(found["chat"][0])
    assert CODE[2] in tokenizer.decode(found["code"][2])


def test_options_of_an_earlier_attempt_are_kept(tmp_path: Path) -> None:
    from drafts_smollm2 import chosen

    (tmp_path / "stage.json").write_text('{"method": "draft.eagle3", "tokens": 77}')
    options = argparse.Namespace(out=tmp_path, minutes=90.0, kind="standalone")
    assert chosen(options) == {"method": "draft.eagle3", "tokens": 77}


def test_the_model_of_costs_is_near_what_was_measured() -> None:
    """c within a tenth and v within 0.16; the report's weights are those of the modules."""
    from draft_sizes import COST, VERIFY, architecture, weights

    target, eagle, one = weights(architecture("SmolLM2-135M"))
    assert target == 134_479_872  # 134,515,008 parameters but for the vectors of the norms
    layer = 64 * 576 * (2 * (9 + 3 + 3) + 9) + 3 * 576 * 1536  # q, k and v read twice the width
    assert eagle == layer + 49152 // 6 * 576
    assert one == 576 * (2 * 576 + 2 * 192 + 3 * 1536) + 49152 * 576
    cost, verify = predicted_costs(target, eagle, len(VERIFY), products_share(VERIFY))
    assert cost == pytest.approx(COST, rel=0.1)
    assert verify == pytest.approx(VERIFY, abs=0.16)


def test_what_a_speed_up_needs_gives_it() -> None:
    from draft_sizes import needed

    verify = (1.1, 1.2, 1.3, 1.4)
    rate, drafted, length = needed(1.4, 0.06, verify)
    shares = [rate**place for place in range(1, 5)]
    assert best_drafted(shares, 0.06, verify) == (drafted, pytest.approx(1.4))
    assert length == pytest.approx(1 + sum(shares[:drafted]))
