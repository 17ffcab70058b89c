"""The importance matrix: sums that do not depend on padding, in the file llama.cpp reads."""

from __future__ import annotations

from pathlib import Path

import gguf as library
import numpy as np
import pytest
import torch

from compressor.errors import ModelError
from compressor.formats.imatrix import Importance, write_imatrix
from compressor.importance import measure_importance
from compressor.model.load import load_model
from compressor.progress import SilentObserver
from compressor.resources import builtin_model
from compressor.types import TokenBatch

DOWN = "model.layers.2.mlp.down_proj"


def test_sums_are_those_of_the_whole_model() -> None:
    """Against a hook on the model as transformers runs it, without the padding."""
    tiny = builtin_model("tiny")
    ids = torch.arange(2, 42).view(2, 20)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 13:] = False
    batch = TokenBatch(ids, mask, ("a", "b"))
    found = measure_importance(tiny, (batch,), SilentObserver())[DOWN]
    seen = []
    model = load_model(tiny, dtype=torch.float32)
    model.get_submodule(DOWN).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        for row, valid in zip(ids, mask, strict=True):
            model(row[valid][None])
    expected = sum(inputs[0].double().square().sum(0) for inputs in seen)
    assert found.tokens == 33
    assert torch.allclose(found.squares.double(), torch.as_tensor(expected), rtol=1e-4)


def test_the_file_holds_sums_and_counts(tmp_path: Path) -> None:
    squares = torch.arange(1.0, 5.0)
    write_imatrix(tmp_path / "im.gguf", {DOWN: Importance(squares, 48)}, dataset="d", chunk=16)
    reader = library.GGUFReader(tmp_path / "im.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    tensors = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["d"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (3, 16)
    assert tensors["blk.2.ffn_down.weight.in_sum2"].tolist() == [[1, 2, 3, 4]]
    assert tensors["blk.2.ffn_down.weight.counts"].tolist() == [[48]]


def test_a_matrix_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no name"):
        write_imatrix(
            tmp_path / "im.gguf", {"h.0.c_attn": Importance(torch.ones(2), 1)}, dataset="", chunk=1
        )
