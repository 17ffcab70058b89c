"""The precision that a model runs in while text is measured."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from compressor import machine
from compressor.model.precision import stage_dtype, working_dtype
from tests.model.conftest import build

CPU = torch.device("cpu")


@pytest.mark.parametrize("flag", ["amx_bf16", "avx512_bf16", "avx2"])
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_a_cpu_computes_in_bf16_where_model_and_units_are(
    stored: torch.dtype, flag: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", stored).save_pretrained(tmp_path)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({flag}))
    both = stored == torch.bfloat16 and flag != "avx2"
    assert working_dtype(tmp_path, CPU) == (torch.bfloat16 if both else torch.float32)


def test_one_wide_matrix_widens_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is rounded must not have been rounded by the walk before; norms do not matter."""
    build("llama", torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"amx_bf16"}))
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    for name, expected in (("input_layernorm", torch.bfloat16), ("mlp.up_proj", torch.float32)):
        key = f"model.layers.1.{name}.weight"
        save_file(tensors | {key: tensors[key].float()}, file, metadata={"format": "pt"})
        assert working_dtype(tmp_path, CPU) == expected


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16, torch.float32])
def test_stages_compute_in_what_holds_the_weights(
    stored: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build("llama", stored).save_pretrained(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: True)
    expected = torch.bfloat16 if stored == torch.bfloat16 else torch.float32
    assert stage_dtype(tmp_path, torch.device("cuda")) == expected
    assert stage_dtype(tmp_path, CPU) == torch.float32
