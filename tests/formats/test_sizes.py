from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.formats import compressed_tensors as ct
from compressor.formats.files import checkpoint_bytes
from compressor.formats.shards import CheckpointReader
from compressor.formats.sizes import bits_per_weight, measure, packed_bytes, tensor_bytes
from compressor.types import QTensor, WeightScheme

from .helpers import quantize_checkpoint
from .test_codes import qtensors

DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def measured(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {name: tensor.numel() * tensor.element_size() for name, tensor in tensors.items()}


@given(qtensors(), st.sampled_from(["pack-quantized", "int-quantized"]))
@settings(max_examples=200)
def test_formula_is_what_is_packed(quantized: QTensor, form: str) -> None:
    tensors = measured(ct.compress(quantized, form))  # type: ignore[arg-type]
    out, in_features = quantized.codes.shape
    size = packed_bytes(
        (out, in_features),
        quantized.scheme,
        DTYPES[quantized.scale.dtype],
        form,  # type: ignore[arg-type]
    )
    assert size.codes == tensors.get("weight_packed", tensors.get("weight"))
    assert size.scales == tensors["weight_scale"]
    assert size.zero_points == tensors.get("weight_zero_point", 0)
    assert size.total == sum(tensors.values())


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [
        (WeightScheme(4, 128), 4.125),
        (WeightScheme(4, 128, "asymmetric"), 4.15625),
        (WeightScheme(3, 128), 3.125),
        (WeightScheme(2, 64), 2.25),
        (WeightScheme(8, None), 8 + 16 / 4096),
    ],
)
def test_bits_per_weight_of_the_tables(scheme: WeightScheme, bits: float) -> None:
    assert bits_per_weight((4096, 4096), scheme, "F16") == bits


def test_words_are_whole() -> None:
    # 33 codes of 3 bits are 99 bits: 4 words, not 3.09.
    assert packed_bytes((5, 33), WeightScheme(3, None)).codes == 5 * 4 * 4
    assert tensor_bytes((3, 5), "BF16") == 30


def test_measured_checkpoint_is_the_formula(llama: Path, tmp_path: Path) -> None:
    schemes = {"down_proj": WeightScheme(3, 32, "full_range"), "lm_head": WeightScheme(8, None)}

    def choose(module: str) -> WeightScheme | None:
        leaf = module.rpartition(".")[2]
        return schemes.get(leaf, WeightScheme(4, 16) if leaf in ("q_proj", "o_proj") else None)

    dense, codes = quantize_checkpoint(llama, tmp_path / "dense", choose)
    base = CheckpointReader(llama)
    parameters = sum(math.prod(base.shape(name)) for name in base)
    ct.export(dense, codes, tmp_path / "export", logical_parameters=parameters)
    report = measure(tmp_path / "export", parameters)
    sizes = {
        module: packed_bytes(tuple(base.shape(f"{module}.weight")), codes.scheme(module))  # type: ignore[arg-type]
        for module in codes
    }
    head = sizes.pop("lm_head")
    dense_bytes = sum(
        tensor_bytes(base.shape(name), "BF16")
        for name in base
        if name.removesuffix(".weight") not in codes
    )
    assert report.by_role["codes"] == sum(size.codes for size in sizes.values())
    assert report.by_role["scales"] == sum(size.scales for size in sizes.values())
    assert report.by_role["head"] == head.total
    assert report.by_role["embeddings"] == 64 * 64 * 2
    assert report.tensor_bytes == sum(s.total for s in sizes.values()) + head.total + dense_bytes
    assert report.bits_checkpoint == 8 * report.tensor_bytes / parameters
    assert report.bytes_on_disk == checkpoint_bytes(tmp_path / "export") > report.tensor_bytes
    # Per layer: down 64·96 at 3 bits, q and o 2·64·64 at 4, k and v 2·32·64, gate and up 2·64·96.
    three, four, dense_weights = 64 * 96, 2 * 64 * 64, 2 * 32 * 64 + 2 * 64 * 96
    nominal = (3 * three + 4 * four + 16 * dense_weights) / (three + four + dense_weights)
    assert report.bits_nominal == pytest.approx(nominal)
    scales = 16 * (three / 32 + four / 16) / (three + four + dense_weights)
    assert report.bits_linear == pytest.approx(nominal + scales)


def test_dense_checkpoint_has_sixteen_bits(tied_llama: Path) -> None:
    base = CheckpointReader(tied_llama)
    parameters = sum(math.prod(base.shape(name)) for name in base)
    report = measure(tied_llama, parameters)
    assert report.bits_checkpoint == report.bits_nominal == report.bits_linear == 16
    assert report.by_role["head"] == report.by_role["codes"] == 0


def test_asymmetric_and_int8_roles(llama: Path, tmp_path: Path) -> None:
    scheme = WeightScheme(8, None, "asymmetric")
    dense, codes = quantize_checkpoint(
        llama, tmp_path / "dense", lambda m: scheme if "proj" in m else None
    )
    weights = sum(math.prod(codes[module].codes.shape) for module in codes)
    rows = sum(codes[module].codes.shape[0] for module in codes)
    for form, zeros in (("pack-quantized", rows), ("int-quantized", rows)):
        ct.export(dense, codes, tmp_path / form, logical_parameters=1, form=form)  # type: ignore[arg-type]
        report = measure(tmp_path / form, 1)
        assert report.by_role["codes"] == weights
        assert report.by_role["zero_points"] == zeros
        assert report.by_role["scales"] == 2 * rows
        assert report.bits_nominal == 8
