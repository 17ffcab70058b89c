"""What the README tells people to type is typed here."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from compressor.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{re.escape(language)}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shrink(command: str) -> list[str]:
    """The words of a command; runs get less text, which changes the numbers only."""
    # What so little text leaves undecided is not the README's claim.
    words = re.sub(r" --set gates\S+", "", command).split()
    runs = words[1].endswith(".yaml") or words[1] == "quickstart"
    if not runs:
        return [*words[1:], "--documents=1"] if words[1] in {"eval", "compare"} else words[1:]
    settings = ["calibration.samples=8", "calibration.length=128", "evaluate.documents=2"]
    settings += ["gates={}"]
    if words[1] == "quickstart":  # which ends with a draft
        settings += [f"stages.2.{name}" for name in ("tokens=512", "steps=8", "new_tokens=8")]
    return [*words[1:], *(f"--set={setting}" for setting in settings)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipes").symlink_to(ROOT / "recipes")
    return folder


def test_every_shell_command_works(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # main sets its own
    commands = [line for block in blocks("sh") for line in block.splitlines()]
    assert len(commands) > 10
    for command in commands:
        with pytest.raises(SystemExit) as left:
            main(shrink(command))
        assert left.value.code == 0, f"{command}\n{capsys.readouterr()}"


def test_every_python_example_works(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    examples = blocks("python")
    assert len(examples) == 3
    for example in examples:
        exec(example, {})
        assert capsys.readouterr().out.strip()


def test_the_recipe_is_valid(recipe_file) -> None:
    (recipe,) = blocks("yaml")
    assert recipe_file(recipe).stages[0].label == "GPTQ W4 g64"


def test_the_make_targets_exist() -> None:
    targets = re.findall(r"^    make (\w+)$", README, re.MULTILINE)
    assert targets == ["quickstart", "test"]
    for target in targets:
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, capture_output=True)


def test_every_file_and_folder_exists() -> None:
    named = re.findall(r"\]\((?!http)([^)]+)\)|`([\w./-]+/)`", README)
    paths = [link or folder for link, folder in named]
    shipped = [path for path in paths if not path.startswith(("out/", "deliverable/"))]
    assert [path for path in shipped if not (ROOT / path).exists()] == []
