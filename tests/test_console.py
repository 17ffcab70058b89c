"""Measuring from the command line; numbers, durations and progress in words."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import click
import pytest

from compressor import console, resources
from compressor.cli import cli
from compressor.errors import (
    RecipeError,
)
from compressor.progress import PlainObserver, RichObserver, SilentObserver, observer
from tests.command import Compress

GOOD = "stages:\n  - method: quantize.rtn\n    group_size: 64\n"


# ---------------------------------------------------------------------- gates, numbers


def test_gates_from_options_and_files(tmp_path: Path) -> None:
    from compressor.compare import read_gates

    path = tmp_path / "margins.yaml"
    path.write_text("max_kl: 0.5\nmin_top1_agreement: 0.9\n", encoding="utf-8")
    limits = read_gates([str(path), "max_kl=0.1"])
    assert (limits.max_kl, limits.min_top1_agreement, limits.max_bytes) == (0.1, 0.9, None)
    with pytest.raises(RecipeError, match="--gate max_k: unknown key 'max_k' in gates"):
        read_gates(["max_k=0.1"])
    path.write_text("max_kl: -1\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"margins\.yaml:1:9: max_kl in gates|margins"):
        read_gates([str(path)])


def test_bad_evaluation_options(compress: Compress) -> None:
    result = compress("eval", "builtin:tiny", "--length", "3", "--documents", "0")
    assert result.code == 2
    assert "--length" in result.err
    assert "--documents" in result.err
    assert "greater than or equal to" not in result.err, "the validator's words are not ours"
    result = compress("eval", "builtin:tiny", "--text", "mine.txt")
    assert (result.code, "DOMAIN=FILE" in result.err) == (2, True)


def test_models_with_different_tokenizers_are_not_compared(
    compress: Compress, tmp_path: Path
) -> None:
    other = tmp_path / "other"
    shutil.copytree(resources.builtin_model("tiny"), other)
    path = other / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    result = compress("compare", "builtin:tiny", str(other), "--documents", "1", "--length", "64")
    assert result.code == 2
    assert "different tokenizers" in result.err


def test_comparing_a_model_with_itself(compress: Compress, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    args = ["compare", "builtin:tiny", "builtin:tiny", "--text", f"words={text}", "--length", "64"]
    result = compress(*args, "--gate", "max_kl=0.001", "--format", "json", "-q")
    assert result.code == 0, result.err
    assert result.json["verdict"] == "PASS"
    base, same = result.json["evaluations"]
    assert base["overall"]["perplexity"] == same["overall"]["perplexity"]
    assert abs(same["overall"]["divergence"]["mean"]["value"]) < 1e-6
    assert result.err == ""
    human = compress(*args, "--gate", "max_kl=0.001", "-q")
    assert "builtin:tiny" in human.out
    assert human.out.count("PASS") == 1
    assert "worst: words, KL " in human.out
    assert "the worst of all domains at once" in human.out
    assert "predicted tokens of " in human.out
    assert "[95 % interval]: a bootstrap over documents" in human.out
    assert human.out.count("100.0%") == 2  # the model and its domain choose the same tokens


def test_a_run_from_the_first_line_to_the_report(compress: Compress, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    out = tmp_path / "run"
    line = ["w4-rtn", "builtin:tiny", "-o", str(out), "-q", "--set", "evaluate.length=64"]
    line += ["--set", f"evaluate.text.words={text}", "--set", "evaluate.noise_floor=false"]
    failed = compress(*line, "--set", "gates.max_kl=0", "--format", "json")
    assert failed.code == 4, failed.err
    assert failed.json["verdict"] == "FAIL"
    assert failed.json["report"]["run"]["command"].startswith("compress w4-rtn builtin:tiny")
    assert "a quality gate failed" in failed.err
    assert str(out / "report.html") in failed.err
    assert compress("resume", str(out), "-q").code == 4  # nothing left to do, the same verdict
    other = compress(*line, "--set", "stages.0.bits=3")
    assert other.code == 2
    assert "Traceback" not in other.err
    page = compress("report", str(out), "--as", "html").out
    assert page.rstrip() == (out / "report.html").read_text(encoding="utf-8").rstrip()
    assert compress("report", str(out), "--format", "json").json["verdict"] == "FAIL"
    assert compress("report", str(tmp_path)).code == 2
    assert compress("resume", str(tmp_path)).code == 2


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1500, "1.5 kB"), (4.85e6, "4.85 MB"), (2e15, "2e+03 TB")],
)
def test_sizes_in_words(number: float, text: str) -> None:
    assert console.size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(1, "1 s"), (89, "89 s"), (120, "2 min"), (7200, "2.0 h")]
)
def test_durations_in_words(seconds: float, text: str) -> None:
    assert console.duration(seconds) == text


# ---------------------------------------------------------------------- progress


def test_observers(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with observer(quiet=True) as silent:
        assert isinstance(silent, SilentObserver)
        silent.event("stage", stage="x")
    with observer(quiet=False) as plain:
        assert isinstance(plain, PlainObserver)
        plain.event("stage", stage="01")
        with plain.task("blocks", 2) as task:
            task.advance()
            task.advance()
    streams = capsys.readouterr()
    assert streams.out == ""
    first, last = streams.err.splitlines()
    assert first == "stage  stage=01"
    assert last.startswith("blocks  2/2")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    with observer(quiet=False) as bars:
        assert isinstance(bars, RichObserver)
        bars.event("stage", stage="01")
        with bars.task("blocks", 2) as task:
            task.advance(2)


def test_the_runner_sees_the_same_group() -> None:
    assert isinstance(cli, click.Group)
