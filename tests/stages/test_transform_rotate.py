"""Rotations leave the function alone, in every family that has them, and tame outliers."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from compressor import resources
from compressor.engine import run_recipe
from compressor.errors import VerificationError
from compressor.formats.shards import CheckpointReader
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model
from compressor.numerics.hadamard import Rotation
from compressor.numerics.rtn import rtn
from compressor.recipe import load_recipe
from compressor.stages import rotating
from compressor.stages.context import StageContext
from compressor.stages.transform_rotate import TransformRotate
from compressor.types import BlockRecord, StageResult, WeightScheme
from compressor.verify import verify_tensors
from tests.helpers import stage_context
from tests.model.conftest import build

RESIDUAL = (
    "llama",
    "llama-tied-biased",
    "mistral",
    "qwen2",
    "qwen2-tied",
    "qwen3",
    "qwen3-biased",
    "phi3",
    "phi3-long-rope",
    "smollm3",
    "granite",
    "mixtral",
    "qwen3_moe",
    "qwen3_moe-mixed",
)
HEADS_ONLY = ("gemma2", "gemma3", "olmo2", "opt", "opt-postnorm", "opt-plain", "gpt2")


def context(folder: Path, finished: tuple[BlockRecord, ...] = (), block_done=None) -> StageContext:
    done = block_done or (lambda _: None)
    return stage_context(folder, finished=finished, block_done=done)


def save(tmp_path: Path, variant: str, dtype: torch.dtype = torch.float32, **changes) -> Path:
    folder = tmp_path / "parent"
    build(variant, dtype, **changes).save_pretrained(folder)
    return folder


def rotate(parent: Path, **options) -> StageResult:
    result = TransformRotate(**options).run(parent, None, context(parent.parent / "child"))
    verify_tensors(parent, result.checkpoint, result.changed, result.added)
    return result


def logits(folder: Path) -> Tensor:
    ids = torch.randint(0, 96, (3, 12), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return load_model(folder, dtype=torch.float32)(ids).logits


def require_same_function(parent: Path, child: Path) -> None:
    expected = logits(parent)
    assert expected.abs().max() > 0.5  # else the tolerance below would say nothing
    torch.testing.assert_close(logits(child), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("variant", RESIDUAL)
def test_every_rotatable_family_keeps_its_function(tmp_path: Path, variant: str) -> None:
    parent = save(tmp_path, variant)
    result = rotate(parent)
    require_same_function(parent, result.checkpoint)
    (difference,) = result.notes.values()
    assert difference < 2e-5

    architecture = Architecture.from_config(read_config(parent))
    child = CheckpointReader(result.checkpoint)
    matrices = {m.tensor for m in architecture.matrices}
    assert matrices <= set(result.changed)
    for index in range(architecture.layers):
        for norm, readers in architecture.norm_readers(index).items():
            assert readers
            assert torch.equal(child[norm], torch.ones_like(child[norm]))
    assert type(load_model(parent)) is type(load_model(result.checkpoint))


@pytest.mark.parametrize("variant", ["llama", "qwen2", "granite", "mixtral"])
def test_a_tied_head_becomes_its_own_and_the_plan_knew(tmp_path: Path, variant: str) -> None:
    parent = save(tmp_path, variant, tie_word_embeddings=True)
    before = Architecture.from_config(read_config(parent))
    stage = TransformRotate(kind="orthogonal", seed=3)
    planned = stage.plan(before, pytest.fail)
    result = rotate(parent, kind="orthogonal", seed=3)
    require_same_function(parent, result.checkpoint)
    assert result.added == ("lm_head.weight",)
    after = Architecture.from_config(read_config(result.checkpoint))
    assert not after.tied
    assert dict(after.tensors()) == dict(planned.tensors())
    assert planned.bytes - before.bytes == 96 * 32 * 4
    (remark,) = (text for text in stage.remarks(before) if "unties" in text)
    assert "0.01 MB" in remark
    assert set(stage.changed(before, planned)) == set(planned.matrices)
    child = CheckpointReader(result.checkpoint)
    assert {name: child.shape(name) for name in child} == dict(after.tensors())


def test_a_tied_head_that_is_stored_twice(tmp_path: Path) -> None:
    """Some checkpoints hold the tied head as well; transformers believes one that differs."""
    parent = save(tmp_path, "qwen2-tied")
    tensors = dict(CheckpointReader(parent))
    for factor in (1.0, 2.0):
        head = {"lm_head.weight": factor * tensors["model.embed_tokens.weight"]}
        save_file(tensors | head, parent / "model.safetensors", {"format": "pt"})
        if factor == 1.0:
            result = rotate(parent)
            assert result.added == ()
            assert "lm_head.weight" in result.changed
            require_same_function(parent, result.checkpoint)
        else:
            with pytest.raises(VerificationError, match="function"):
                rotate(parent)


@pytest.mark.parametrize("variant", [*HEADS_ONLY, "llama-tied-biased", "phi3", "mixtral"])
def test_heads_alone_cost_nothing_and_work_in_almost_every_family(
    tmp_path: Path, variant: str
) -> None:
    parent = save(tmp_path, variant)
    before = Architecture.from_config(read_config(parent))
    stage = TransformRotate(where="heads")
    assert stage.plan(before, pytest.fail) == before
    assert stage.remarks(before) == ()
    result = rotate(parent, where="heads")
    require_same_function(parent, result.checkpoint)
    assert result.added == ()
    changed = {m.tensor for m in stage.changed(before, before)}
    assert {name for name in result.changed if name.endswith(".weight")} == changed
    assert len(changed) == 2 * before.layers


@pytest.mark.parametrize(
    ("variant", "where", "reason"),
    [
        ("gpt2", "all", "subtracts the mean"),
        ("opt", "residual", "subtracts the mean"),
        ("gpt_neox", "residual", "subtracts the mean"),
        ("gemma2", "all", r"1 \+ w"),
        ("gemma3", "residual", r"1 \+ w"),
        ("olmo2", "all", "post-norm"),
        ("gpt_neox", "heads", "head by head"),
    ],
)
def test_what_would_change_the_function_is_refused_with_the_reason(variant, where, reason) -> None:
    architecture = Architecture.from_config(build(variant).config.to_dict())
    found: list[tuple[str, str, str]] = []
    TransformRotate(where=where).plan(architecture, lambda *problem: found.append(problem))
    assert any(option == "where" for option, _, _ in found)
    assert any(re.search(reason, message) for _, message, _ in found)
    assert all(hint for _, _, hint in found)


def test_widths_without_a_hadamard_matrix_are_refused_or_remarked() -> None:
    def architecture(hidden: int) -> Architecture:
        sizes = {"hidden_size": hidden, "num_attention_heads": 1, "num_key_value_heads": 1}
        return Architecture.from_config(
            {**build("llama").config.to_dict(), **sizes, "head_dim": 64}
        )

    found: list[str] = []
    stage = TransformRotate()
    stage.plan(architecture(90), lambda option, message, hint: found.append(message + hint))
    assert "90 channels" in found[0]
    assert "kind: orthogonal" in found[0]
    TransformRotate(kind="orthogonal").plan(architecture(90), pytest.fail)
    stage.plan(architecture(184), pytest.fail)
    assert "23 blocks of 8" in stage.remarks(architecture(184))[0]
    assert stage.remarks(architecture(576)) == ()


def test_bf16_is_rounded_once_from_fp64(tmp_path: Path) -> None:
    parent = save(tmp_path, "llama", torch.bfloat16)
    wide = tmp_path / "wide" / "parent"
    load_model(parent, dtype=torch.float32).save_pretrained(wide)
    narrow, exact = rotate(parent), rotate(wide)
    assert max(narrow.notes.values()) < 2e-5
    stored, reference = (CheckpointReader(r.checkpoint) for r in (narrow, exact))
    for name in stored:
        assert stored[name].dtype == torch.bfloat16
        torch.testing.assert_close(
            stored[name].float(), reference[name], rtol=2**-8, atol=0, msg=name
        )


def test_the_seed_decides_and_an_interrupted_stage_ends_with_the_same_bytes(tmp_path: Path) -> None:
    parent = save(tmp_path, "qwen2-tied")

    class Killed(Exception):
        pass

    def kill(_: BlockRecord) -> None:
        raise Killed

    stage = TransformRotate(seed=7)
    with pytest.raises(Killed):
        stage.run(parent, None, context(tmp_path / "resumed", block_done=kill))
    stage.run(parent, None, context(tmp_path / "resumed", finished=(BlockRecord(0),)))
    stage.run(parent, None, context(tmp_path / "whole"))
    TransformRotate(seed=8).run(parent, None, context(tmp_path / "other"))

    def content(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}

    assert content("resumed") == content("whole")
    assert content("other").keys() == content("whole").keys()
    assert content("other") != content("whole")


# ---------------------------------------------------------------------- mutants


def _no_gamma(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rotating.Fold._weight

    def fold(self, matrix, stored):
        gamma = self.reader[self._gammas[matrix.name]] if matrix.name in self._gammas else 1.0
        return whole(self, matrix, stored / gamma)

    monkeypatch.setattr(rotating.Fold, "_weight", fold)


def _no_gamma_in_the_head(monkeypatch: pytest.MonkeyPatch) -> None:
    def table(self, name, table, dtype):
        return self.residual.right(table).to(dtype)

    monkeypatch.setattr(rotating.Fold, "_table", table)


def _wrong_transpose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Rotation, "left", lambda self, x: self.dense() @ x.double())


def _centred_embedding(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rotating.Fold._table

    def table(self, name, table, dtype):
        centred = table if name == self._head else table - table.mean(1, keepdim=True)
        return whole(self, name, centred, dtype)

    monkeypatch.setattr(rotating.Fold, "_table", table)


def _bias_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotating.Fold, "_bias", lambda self, matrix, bias: bias)


def _values_of_one_head_only(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rotating.Fold._on_heads

    def fold(self, matrix, weight, rotation):
        rotated = whole(self, matrix, weight, rotation)
        if matrix.role == "v":
            rotated[rotation.size :] = weight[rotation.size :]
        return rotated

    monkeypatch.setattr(rotating.Fold, "_on_heads", fold)


def _router_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rotating.Fold._weight

    def fold(self, matrix, stored):
        return stored if matrix.role == "router" else whole(self, matrix, stored)

    monkeypatch.setattr(rotating.Fold, "_weight", fold)


def _other_bytes_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = rotating.Fold.stored
    monkeypatch.setattr(
        rotating.Fold,
        "stored",
        lambda self, names: {name: value * 1.02 for name, value in whole(self, names).items()},
    )


@pytest.mark.parametrize(
    ("mutate", "variant"),
    [
        (_no_gamma, "llama"),
        (_no_gamma_in_the_head, "llama"),
        (_no_gamma_in_the_head, "qwen2-tied"),
        (_wrong_transpose, "llama"),
        (_centred_embedding, "llama"),
        (_bias_left_alone, "llama-tied-biased"),
        (_bias_left_alone, "qwen2"),
        (_values_of_one_head_only, "llama"),
        (_router_forgotten, "mixtral"),
        (_other_bytes_on_disk, "llama"),
    ],
)
def test_mutants_are_caught_by_the_stage_itself(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    mutate: Callable[[pytest.MonkeyPatch], None],
    variant: str,
) -> None:
    parent = save(tmp_path, variant)
    mutate(monkeypatch)
    with pytest.raises(VerificationError, match=r"function|not stored as"):
        rotate(parent)


# ---------------------------------------------------------------------- through the engine

RECIPE = """\
calibration: {samples: 2, length: 32, batch_size: 2}
stages:
  - method: transform.rotate
  - {method: quantize.gptq, bits: 4, group_size: 16, head: quantize}
evaluate: {documents: 1, length: 64, resamples: 100, noise_floor: false, batch_size: 16}
export:
  - format: compressed-tensors
"""


@pytest.mark.parametrize("variant", ["qwen2-tied", "mixtral"])
def test_from_checkpoint_to_deliverable(tmp_path: Path, variant: str) -> None:
    parent = save(tmp_path, variant, torch.bfloat16, vocab_size=4096)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(resources.builtin_model("tiny") / name, parent)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE)
    outcome = run_recipe(load_recipe(recipe), str(parent), tmp_path / "run")

    base, rotated, rounded = outcome.report.variants
    tied = Architecture.from_config(read_config(parent)).tied
    head = 4096 * 32 * 2
    assert rotated.size.by_role.head == head
    assert base.size.by_role.head == (0 if tied else head)
    assert rotated.size.tensor_bytes - base.size.tensor_bytes == (head if tied else 0)
    assert rounded.size.by_role.head < 0.6 * head
    assert rotated.stage is not None
    assert max(rotated.stage.notes.values()) < 1e-4
    scores = outcome.report.evaluations
    divergence = scores[rotated.id].overall.divergence
    assert divergence is not None
    assert divergence.mean.value < 1e-3  # bf16 storage, nothing else
    reloaded = load_model(outcome.folder / "deliverable" / "compressed-tensors")
    assert not reloaded.config.tie_word_embeddings


# ---------------------------------------------------------------------- what it is for


def test_planted_outliers_are_spread_and_weights_round_better(tmp_path: Path) -> None:
    model = build("llama", hidden_size=256, intermediate_size=192, head_dim=64)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2 and "layers" in name:
                on_inputs = not name.endswith(("o_proj.weight", "down_proj.weight"))
                (parameter.T if on_inputs else parameter)[[5, 77]] *= 20
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
    parent = tmp_path / "parent"
    model.save_pretrained(parent)
    result = rotate(parent)
    before, after = CheckpointReader(parent), CheckpointReader(result.checkpoint)
    scheme = WeightScheme(4, 64)
    for name in before:
        if ".layers." in name and before[name].ndim == 2:
            assert _kurtosis(before[name]) > 30
            assert _kurtosis(after[name]) < 4.5
            assert _peak(after[name]) < 0.35 * _peak(before[name])
            if not name.endswith(("o_proj.weight", "down_proj.weight")):
                # Outliers along the inputs share a scale with others; a row has its own.
                ratio = _rounding_error(after[name], scheme) / _rounding_error(before[name], scheme)
                assert ratio < 1.05


def _kurtosis(weight: Tensor) -> float:
    """Fourth moment over the squared second: 3 for a Gaussian."""
    return float(weight.pow(4).mean() / weight.square().mean().square())


def _peak(weight: Tensor) -> float:
    return float(weight.abs().max() / weight.square().mean().sqrt())


def _rounding_error(weight: Tensor, scheme: WeightScheme) -> float:
    dense = rtn(weight, scheme, scale_dtype=torch.float32).dequantize()
    return float((weight - dense).square().sum() / weight.square().sum())
