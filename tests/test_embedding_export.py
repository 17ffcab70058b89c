"""`export: {format: gguf, embedding: Q8_0}`: a rounding of its own, in file and report."""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import gguf as library
import numpy as np
import pytest
import torch

from compressor import requantize
from compressor.cli import main
from compressor.engine import RunOutcome, run_recipe
from compressor.errors import PlanError, RecipeError, VerificationError
from compressor.formats import gguf
from compressor.formats.codes import CodesReader
from compressor.formats.exporters import Source
from compressor.formats.gguf_metadata import ROUNDED_KEY
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.formats.sizes import measure
from compressor.model.load import read_config
from compressor.plan import make_plan
from compressor.publish import plan_publication
from compressor.recheck import verify_folder
from compressor.recipe import Recipe, load_recipe
from compressor.report.build import check_report
from compressor.resources import builtin_model
from compressor.types import WeightScheme
from tests.formats.helpers import quantize_checkpoint
from tests.runs import SMOL, TINY, load

RECIPE = """\
stages: STAGES
evaluate: {documents: 1, length: 128, noise_floor: false, resamples: 200}
gates: {max_kl: 0.9}
export: EXPORT
"""
RTN = "[{method: quantize.rtn, bits: 4, group_size: 32}]"
BOTH = "[{format: gguf}, {format: gguf, embedding: Q4_0}]"
NAME = "gguf-embedding-Q4_0"
EMBEDDING = "model.embed_tokens.weight"


def loaded(folder: Path, export: str, stages: str = RTN) -> Recipe:
    return load(folder, RECIPE.replace("EXPORT", export).replace("STAGES", stages))


# ---------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def tied() -> Path:
    return builtin_model("tiny")


@pytest.fixture(scope="module")
def untied(tied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with a head of its own, another than the embedding."""
    folder = tmp_path_factory.mktemp("untied")
    weights = dict(CheckpointReader(tied).items())
    writer = CheckpointWriter(folder)
    writer.write_shard(shard_name(0), {**weights, "lm_head.weight": weights[EMBEDDING].flip(0)})
    writer.finish(read_config(tied) | {"tie_word_embeddings": False}, tied, 1)
    return folder


@pytest.mark.parametrize(
    ("model", "kind"), [("untied", "Q8_0"), ("tied", "Q8_0"), ("tied", "Q5_1"), ("tied", "Q4_0")]
)
def test_what_has_no_codes_is_rounded_as_ggml_rounds(
    model: str, kind: Any, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """The head too where it is a matrix of its own; all else is as in a file without the option."""
    scheme, base = WeightScheme(4, 32), request.getfixturevalue(model)
    dense, codes = quantize_checkpoint(
        base, tmp_path / "d", lambda m: scheme if ".layers." in m else None
    )
    gguf.write(Source(dense, codes, 1, "gguf"), tmp_path / "plain")
    gguf.write(Source(dense, codes, 1, "gguf", embedding=kind), tmp_path / "rounded")
    plain, rounded = (
        {t.name: t for t in library.GGUFReader(tmp_path / name / gguf.FILE).tensors}
        for name in ("plain", "rounded")
    )
    changed = {"token_embd.weight"} | ({"output.weight"} if model == "untied" else set())
    assert plain.keys() == rounded.keys()
    for name, tensor in rounded.items():
        if name not in changed:
            assert np.array_equal(tensor.data, plain[name].data), name
    reader = CheckpointReader(dense)
    read = dict(gguf.read(tmp_path / "rounded"))
    for name in [EMBEDDING, *(["lm_head.weight"] if model == "untied" else [])]:
        stored = rounded[gguf.gguf_name(name)]
        assert stored.tensor_type.name == kind
        expected = library.quantize(reader[name].float().numpy(), stored.tensor_type)
        assert np.array_equal(stored.data, expected)
        assert np.array_equal(read[name].numpy(), library.dequantize(expected, stored.tensor_type))
        assert read[name].dtype == torch.float32
        assert not torch.equal(read[name], reader[name].float())
    fields = library.GGUFReader(tmp_path / "rounded" / gguf.FILE).fields
    assert set(fields[ROUNDED_KEY].contents()) == changed


def test_codes_of_the_chain_are_not_rounded_again(untied: Path, tmp_path: Path) -> None:
    """Where the chain rounded the embedding, the head alone is left."""
    scheme = WeightScheme(4, 32)
    dense, codes = quantize_checkpoint(
        untied, tmp_path / "d", lambda m: None if m == "lm_head" else scheme
    )
    source = Source(dense, codes, 1, "gguf", embedding="Q8_0")
    assert gguf.rounded_here(source) == ("lm_head.weight",)
    gguf.write(source, tmp_path / "out")
    assert torch.equal(
        dict(gguf.read(tmp_path / "out"))[EMBEDDING], CheckpointReader(dense)[EMBEDDING]
    )


# ---------------------------------------------------------------------- the plan


def test_the_plan_counts_its_bytes_and_says_what_it_does(tmp_path: Path) -> None:
    export = "[{format: gguf}, {format: gguf, embedding: Q8_0}]"
    plain, rounded = make_plan(loaded(tmp_path, export), SMOL, "smol").exports
    dense, blocks = 49152 * 576 * 2, 49152 * 576 // 32 * 34
    assert plain.tensor_bytes - rounded.tensor_bytes == dense - blocks
    (keeps,) = plain.remarks
    assert "56.6 MB of it are the embedding in bfloat16" in keeps
    assert "`embedding: Q8_0` would make that 30.1" in keeps
    (rounds,) = rounded.remarks
    assert "the embedding becomes Q8_0, 30.1 MB in place of 56.6" in rounds
    whole = "[{method: quantize.rtn, bits: 4, group_size: 32, embeddings: quantize}]"
    (no,) = make_plan(loaded(tmp_path, "[{format: gguf}]", whole), SMOL, "smol").exports
    assert not no.remarks


@pytest.mark.parametrize(
    ("export", "says"),
    [
        ("[{format: gptq, embedding: Q8_0}]", "`embedding` is for format gguf; gptq has none"),
        ("[{format: gguf, type: Q4_K_M, embedding: Q8_0}]", "Q4_K_M rounds the embedding itself"),
        ("[{format: gguf, embedding: Q6_K}]", "Q6_K"),
        (f"[{BOTH[1:-1]}, {BOTH[1:-1].partition(', {')[0]}]", "gguf is named twice"),
    ],
)
def test_options_that_say_nothing_are_refused(tmp_path: Path, export: str, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        loaded(tmp_path, export)


@pytest.mark.parametrize(
    ("stages", "config", "says"),
    [
        (
            "[{method: quantize.rtn, bits: 4, group_size: 32, embeddings: quantize}]",
            {},
            "the chain has rounded the embedding",
        ),
        (
            '[{method: quantize.rtn, bits: 4, group_size: channel, targets: ["*.down_proj"]}]',
            {"hidden_size": 300, "head_dim": 60, "num_attention_heads": 5},
            "300 inputs; blocks of Q4_0 have 32",
        ),
    ],
)
def test_the_plan_refuses_what_cannot_be_rounded(
    tmp_path: Path, stages: str, config: dict[str, Any], says: str
) -> None:
    with pytest.raises(PlanError, match=says):
        make_plan(loaded(tmp_path, BOTH, stages), TINY | config, "builtin:tiny")


# ---------------------------------------------------------------------- a run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> RunOutcome:
    folder = tmp_path_factory.mktemp("run")
    return run_recipe(loaded(folder, BOTH), "builtin:tiny", folder / "out")


def test_it_is_a_row_with_its_own_numbers(finished: RunOutcome) -> None:
    report = finished.report
    check_report(report)
    _, stage, row = report.variants
    assert (row.id, row.label, row.parent) == (NAME, "embedding Q4_0", stage.id)
    assert row.stage is not None
    assert row.stage.params == {"embedding": "Q4_0", "quantizer": f"gguf {_version()}"}
    kl = {name: found.overall.divergence for name, found in report.evaluations.items()}
    assert kl[row.id].mean.value > kl[stage.id].mean.value + 1e-4  # type: ignore[union-attr]
    plain, rounded = report.deliverables
    assert (plain.quantizer, plain.embedding) == (None, None)
    assert (rounded.quantizer, rounded.embedding) == (f"gguf {_version()}", "Q4_0")
    assert report.headline == stage.id  # the first deliverable's
    claims = {claim.id: claim.text for claim in report.claims}
    assert f"holds the codes of {stage.id} as they are" in claims[f"quantizer-{NAME}"]
    card = (finished.folder / "README.md").read_text()
    assert f"embedding rounded to Q4_0 by gguf {_version()}" in card
    assert all(check.passed is not False for check in verify_folder(finished.folder))
    published = plan_publication(finished.folder, "me/tiny", public=False)
    assert [one.name for one in published.repositories] == ["me/tiny", f"me/tiny-{NAME}"]


def _version() -> str:
    return version("gguf")


def test_sizes_are_those_of_the_plan(finished: RunOutcome, tmp_path: Path) -> None:
    recipe = load_recipe(finished.folder.parent / "recipe.yaml")
    plan = make_plan(recipe, TINY, "builtin:tiny")
    for export, variant in zip(plan.exports, finished.report.variants[1:], strict=True):
        found = measure(finished.folder / "deliverable" / export.format, plan.parameters)
        assert found.tensor_bytes == export.tensor_bytes
        assert variant.size.bytes_on_disk == found.bytes_on_disk
    plain, rounded = finished.report.variants[1:]
    assert rounded.size.by_role.embeddings == plain.size.by_role.embeddings * 4.5 / 16
    assert rounded.size.by_role.codes == plain.size.by_role.codes


def test_another_tensor_that_changed_is_found(
    finished: RunOutcome, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mutant: everything but the embedding must be what the last stage left."""
    stage = finished.folder / "stages" / finished.report.variants[1].id

    source = Source(stage, CodesReader(stage), 1, "gguf", embedding="Q8_0")
    assert requantize._round_embedding(source, tmp_path / "right").startswith("gguf ")
    honest = gguf._Tensors.data

    def lossy(self: Any, name: str) -> Any:
        found = honest(self, name)
        if name == "model.norm.weight":
            found = found.copy()
            found[2] ^= 1
        return found

    monkeypatch.setattr(gguf._Tensors, "data", lossy)
    with pytest.raises(VerificationError, match=r"model.norm.weight differs from memory"):
        requantize._round_embedding(source, tmp_path / "wrong")


def test_it_can_be_added_to_a_finished_run(
    finished: RunOutcome, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(finished.folder)
    with pytest.raises(SystemExit):
        main(["export", folder, "--as", "gptq", "--embedding", "Q8_0"])
    assert "--embedding is for --as gguf" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["export", folder, "--as", "gguf", "--embedding", "Q8_0"])
    assert caught.value.code in (0, None)
    report = json.loads((finished.folder / "report.json").read_text())
    ids = [variant["id"] for variant in report["variants"]]
    assert ids[-1] == "gguf-embedding-Q8_0"
    means = [
        report["evaluations"][name]["overall"]["divergence"]["mean"]["value"] for name in ids[1:]
    ]
    assert means[2] - means[0] < (means[1] - means[0]) / 10  # 8 bits cost little, 4 bits something


def test_without_a_stage_it_is_the_headline(tmp_path: Path) -> None:
    export = "[{format: gguf, embedding: Q8_0}]"
    outcome = run_recipe(loaded(tmp_path, export, "[]"), "builtin:tiny", tmp_path / "out")
    assert outcome.report.headline == "gguf-embedding-Q8_0"
    found = outcome.report.evaluations["gguf-embedding-Q8_0"].overall.divergence
    assert found is not None
    assert 0 < found.mean.value < 1e-3
