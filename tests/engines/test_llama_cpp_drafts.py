"""Our drafts in llama.cpp: it writes what the target writes alone, and accepts proposals."""

from __future__ import annotations

from pathlib import Path

import gguf as library
import pytest
import torch

from compressor.formats import gguf, gguf_eagle3
from compressor.report.schema import Report
from tests.engines.llama_cpp import (
    BUILT,
    PROMPTS,
    complete,
    convert,
    same_beginning,
    same_tensors,
    speculate,
)
from tests.runs import run as start
from tools.engines import build_llama_cpp

pytestmark = pytest.mark.engines

RECIPE = """\
calibration: {samples: 32, length: 128}
stages:
  - {method: quantize.rtn, bits: 4, group_size: 64}
  - method: draft.standalone
    tokens: 8000
    length: 64
    steps: 150
    drafted: 4
    prompts: 1
    new_tokens: 16
  - method: draft.eagle3
    features: [1, 2, 3]
    tokens: 8000
    length: 64
    steps: 150
    drafted: 4
    prompts: 1
    new_tokens: 16
    tree_nodes: 4
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false}
export: [{format: gguf}]
"""
TOKENS, DRAFTED = 48, 4


@pytest.fixture(scope="session", autouse=True)
def _built() -> None:
    build_llama_cpp.build(BUILT, jobs=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    folder = tmp_path_factory.mktemp("drafted")
    outcome = start(folder, RECIPE)
    return outcome.folder, outcome.report


@pytest.fixture(scope="module")
def target(run: tuple[Path, Report]) -> Path:
    return run[0] / "deliverable" / "gguf" / gguf.FILE


@pytest.mark.parametrize(("place", "kind"), [(0, "draft-simple"), (1, "draft-eagle3")])
def test_a_draft_changes_no_word_and_is_accepted(
    run: tuple[Path, Report], target: Path, place: int, kind: str
) -> None:
    folder, report = run
    draft = report.drafts[place]
    assert draft.gguf is not None
    assert f"--spec-type {kind} -md {draft.gguf}" in draft.load_snippets["llama.cpp"]
    drafted = accepted = 0.0
    for prompt in PROMPTS:
        alone = complete(target, prompt, TOKENS)
        found = speculate(target, folder / draft.gguf, prompt, TOKENS, DRAFTED, kind)
        assert same_beginning(alone, found["text"], prompt), prompt
        drafted, accepted = drafted + found["drafted"], accepted + found["accepted"]
    print(kind, drafted, accepted)
    assert 0.1 < accepted / drafted < 1


def test_the_target_as_its_own_draft_is_right(target: Path) -> None:
    """Every proposal is, but for ties of single against batched."""
    found = speculate(target, target, PROMPTS[0], TOKENS, DRAFTED)
    assert found["accepted"] > 0.9 * found["drafted"]


def test_its_converter_writes_the_same_head(run: tuple[Path, Report], tmp_path: Path) -> None:
    folder, report = run
    head = folder / report.drafts[1].path
    target = folder / "stages" / "01-quantize.rtn"
    convert(head, tmp_path / "theirs.gguf", tmp_path, "--target-model-dir", target)
    ours = folder / str(report.drafts[1].gguf)
    assert same_tensors(ours, tmp_path / "theirs.gguf")
    layers = library.GGUFReader(ours).fields["eagle3.target_layers"].contents()
    assert layers == [1, 2, 3]


def test_a_head_of_noise_is_hardly_accepted(
    run: tuple[Path, Report], target: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: the head's own weights decide, and not the target's."""
    folder, report = run
    read = gguf_eagle3.CheckpointReader.__getitem__

    def noisy(self: gguf_eagle3.CheckpointReader, name: str) -> torch.Tensor:
        found: torch.Tensor = read(self, name)
        return found.flip(0).contiguous() if name == "lm_head.weight" else found

    monkeypatch.setattr(gguf_eagle3.CheckpointReader, "__getitem__", noisy)
    head = folder / report.drafts[1].path
    gguf_eagle3.write(head, folder / "stages" / "01-quantize.rtn", tmp_path)
    found = speculate(target, tmp_path / gguf.FILE, PROMPTS[0], TOKENS, DRAFTED, "draft-eagle3")
    right = folder / str(report.drafts[1].gguf)
    ours = speculate(target, right, PROMPTS[0], TOKENS, DRAFTED, "draft-eagle3")
    assert found["accepted"] / found["drafted"] < 0.5 * ours["accepted"] / ours["drafted"]
    assert same_beginning(complete(target, PROMPTS[0], TOKENS), found["text"], PROMPTS[0])
