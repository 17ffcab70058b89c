"""The promise of the default rounder: calibrated on any one kind of text, it harms no other."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
TEXTS = ("code", "multilingual", "prose", "speeches")  # the kinds that are most unlike others


def test_the_default_is_never_worse_than_rounding_to_nearest_in_any_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    from unseen_domains import main

    words = ["--bits", "4", "--calibrate", ",".join(TEXTS), "--stage", "rtn", "--stage", "gptq"]
    words += ["--samples", "16", "--length", "128", "--documents", "4", "-o", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["unseen_domains.py", *words])
    main()
    _, _, *lines = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines()]
    ratios = {(line[1].strip(), line[2].strip()): float(line[-1]) for line in lines}
    assert {text for _, text in ratios} == set(TEXTS)
    for (stage, text), worst in ratios.items():
        assert worst == 1 if stage == "rtn" else worst < 0.95, text
