"""No calibration text goes over the wire when a run is published, as text or as tokens."""

from __future__ import annotations

import base64
import json
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import save_file

from compressor import publish as publishing
from compressor.calibration import build_batches
from compressor.model.load import load_tokenizer
from compressor.publish import publish
from compressor.recipe import load_recipe
from compressor.report.render import load_report
from compressor.resources import builtin_model
from compressor.text import calibration_documents
from tests.hub_server import Hub
from tests.runs import run as start
from tests.test_publish import api, hub

__all__ = ["api", "hub"]  # fixtures

RECIPE = """\
calibration: {ORIGIN, samples: 4, length: 64}
stages:
  - {method: quantize.gptq, bits: 4, group_size: 64, sweeps: 0}
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
export: [{format: compressed-tensors}, {format: gguf}]
"""
ORIGINS = {"shipped": "mix: default", "own": "source: mine.txt"}
CHARACTERS, TOKENS = 24, 6  # of one probe; they overlap by half, so that runs of 36 and 9 are found
_BASE64 = re.compile(rb'"content": ?"([A-Za-z0-9+/=]+)"')


@pytest.fixture(scope="module")
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    prose = [document.text for document in calibration_documents("prose")]
    (folder / "mine.txt").write_text("\n\n".join(prose)[:20_000])
    return start(folder, RECIPE.replace("ORIGIN", ORIGINS[request.param])).folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "out"))


@pytest.fixture
def rows(finished: Path) -> list[list[int]]:
    """Every window that the stages saw."""
    recipe = load_recipe(finished.parent / "recipe.yaml")
    found = build_batches(recipe.calibration, load_tokenizer(builtin_model("tiny")))
    assert found.sha256 in (finished / "recipe.lock.yaml").read_text()
    return [row for batch in found.batches for row in batch.input_ids.tolist()]


def texts(rows: Sequence[Sequence[int]]) -> list[str]:
    tokenizer = load_tokenizer(builtin_model("tiny"))
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]


def contents(wire: Sequence[bytes]) -> Iterator[bytes]:
    """Requests as they came, and the files inside commits."""
    for request in wire:
        yield request
        for match in _BASE64.finditer(request):
            yield base64.b64decode(match[1])


def probes(rows: Sequence[Sequence[int]]) -> set[bytes]:
    """Pieces of the text, plain and in JSON, and of the tokens, as numbers and in digits."""
    found = set()
    for text in texts(rows):
        for at in range(0, len(text) - CHARACTERS + 1, CHARACTERS // 2):
            piece = text[at : at + CHARACTERS]
            found |= {piece.encode(), json.dumps(piece)[1:-1].encode()}
    for row in rows:
        for at in range(0, len(row) - TOKENS + 1, TOKENS // 2):
            run = row[at : at + TOKENS]
            found |= {np.array(run, kind).tobytes() for kind in ("<i2", "<i4", "<i8")}
            found |= {join.join(map(str, run)).encode() for join in (", ", ",", " ", "\n")}
    return found


def leaks(wire: Sequence[bytes], rows: Sequence[Sequence[int]]) -> set[bytes]:
    """Every piece of the rows that is anywhere in what was sent."""
    wanted, sent = probes(rows), list(contents(wire))
    return {probe for probe in wanted if any(probe in content for content in sent)}


@pytest.mark.parametrize("finished", ORIGINS, indirect=True)
def test_no_calibration_text_is_sent(
    run: Path, rows: list[list[int]], hub: Hub, api: HfApi
) -> None:
    assert len(rows) == 4
    publish(run, "me/tiny", api=api)
    sent = list(contents(hub.wire))
    assert sum(map(len, sent)) > 9_000_000  # both deliverables are in it
    assert not leaks(hub.wire, rows)
    # The search does see what is sent: the evaluation text that the report quotes.
    headline = load_report(run).evaluations[load_report(run).headline]
    quote = max((token.context for token in headline.worst_tokens), key=len)
    assert len(quote) > CHARACTERS
    assert any(json.dumps(quote)[1:-1].encode() in content for content in sent)


def as_text(rows: Sequence[Sequence[int]], path: Path) -> None:
    path.write_text(texts(rows)[3])


def as_json(rows: Sequence[Sequence[int]], path: Path) -> None:
    path.write_text(json.dumps({"input_ids": rows[3][:12]}))


def as_array(rows: Sequence[Sequence[int]], path: Path) -> None:
    np.save(path.open("wb"), np.array(rows, "<i2"))


def as_tensor(rows: Sequence[Sequence[int]], path: Path) -> None:
    save_file({"ids": torch.tensor(rows[2])}, path)


@pytest.mark.parametrize("finished", ["own"], indirect=True)
@pytest.mark.parametrize(
    ("name", "leak"),
    [
        ("samples.txt", as_text),
        ("figures/cache.json", as_json),
        ("rows.npy", as_array),
        ("model-extra.safetensors", as_tensor),  # goes up by its hash, not in a commit
    ],
)
def test_a_leak_is_found(
    run: Path,
    rows: list[list[int]],
    hub: Hub,
    api: HfApi,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    leak: Any,
) -> None:
    """The mutants: a file with calibration text among those that are published."""
    real = publishing._files
    leak(rows, run.parent / "leak")

    def leaky(*arguments: Any) -> dict[str, Path | str]:
        return {**real(*arguments), name: run.parent / "leak"}

    monkeypatch.setattr(publishing, "_files", leaky)
    publish(run, "me/tiny", api=api)
    assert leaks(hub.wire, rows)


@pytest.mark.parametrize("finished", ["own"], indirect=True)
def test_a_message_of_a_commit_is_searched(rows: list[list[int]], hub: Hub, api: HfApi) -> None:
    api.create_repo("me/x")
    api.upload_file(
        repo_id="me/x",
        path_or_fileobj=b"nothing",
        path_in_repo="a.md",
        commit_message=f"made from {texts(rows)[0]}",
    )
    assert leaks(hub.wire, rows)
