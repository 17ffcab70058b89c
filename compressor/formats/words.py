"""What GPTQ and AWQ share: matrices of 32-bit words in a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.errors import ModelError, VerificationError
from compressor.formats.compressed_tensors import scheme_of, targets
from compressor.formats.exchange import container_problems
from compressor.formats.exporters import Source
from compressor.formats.headers import read_json
from compressor.formats.shards import SHARD_BYTES, CheckpointReader, CheckpointWriter, plan_shards
from compressor.types import QTensor, WeightScheme

PACKED = ("qweight", "qzeros", "scales", "g_idx")
_CHUNK_ELEMENTS = 1 << 20
_HEADS = ("lm_head", "embed_out")

Tensors = Mapping[str, Tensor]
Pack = Callable[[QTensor], dict[str, Tensor]]
Unpack = Callable[[Tensors], QTensor]


def half_scales(scale: Tensor) -> Tensor:
    """Scales [out, groups] as fp16, the dtype of these formats; exact for bf16 down to 2^-17.

    Raises:
        ModelError: a scale is beyond fp16.
    """
    half = scale.to(torch.float16)
    if not torch.isfinite(half).all():
        raise ModelError(
            f"a scale of {float(scale.abs().max()):.3g} is beyond fp16, which this format stores",
            "export compressed-tensors, which keeps scales as they are",
        )
    return half


def to_words(values: Tensor, bits: int) -> Tensor:
    """Unsigned values as one stream of bits, lowest first, cut into words.

    Args:
        values: [rows, count] within [0, 2^bits - 1]; count · bits fills whole words.
        bits: of a value.

    Returns:
        int32 [rows, count · bits / 32].
    """
    return torch.cat([_to_words(rows, bits) for rows in _row_chunks(values)])


def _to_words(values: Tensor, bits: int) -> Tensor:
    stream = ((values.long().unsqueeze(-1) >> torch.arange(bits)) & 1).reshape(len(values), -1, 32)
    words = (stream << torch.arange(32)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def from_words(words: Tensor, bits: int) -> Tensor:
    """Inverse of `to_words`: int16 [rows, words · 32 / bits]."""
    return torch.cat([_from_words(rows, bits) for rows in _row_chunks(words)])


def _from_words(words: Tensor, bits: int) -> Tensor:
    stream = (words.unsqueeze(-1) >> torch.arange(32, dtype=torch.int32)) & 1
    values = stream.reshape(len(words), -1, bits)
    return (values << torch.arange(bits)).sum(-1).to(torch.int16)


def _row_chunks(values: Tensor) -> tuple[Tensor, ...]:
    """Rows in parts, because a stream of bits takes 8 bytes for each."""
    return torch.split(values, max(1, _CHUNK_ELEMENTS // values.shape[1]))


def write_words(
    source: Source, out: Path, pack: Pack, unpack: Unpack, configuration: dict[str, Any]
) -> None:
    """Write a checkpoint in which every matrix with codes is what `pack` makes of them.

    Raises:
        ModelError: codes that fit no matrix, or that the container cannot hold.
        VerificationError: dense weights and codes disagree, or packing lost a code.
        ResourceError: the file system refused.
    """
    reader, writer = CheckpointReader(source.checkpoint), CheckpointWriter(out)
    config = read_json(source.checkpoint / "config.json")
    for number, names in enumerate(plan_shards(reader, SHARD_BYTES), start=1):
        tensors: dict[str, Tensor] = {}
        for name in names:
            module = name.removesuffix(".weight")
            if module == name or module not in source.codes:
                tensors[name] = reader[name]
                continue
            packed = _checked(module, source.codes[module], reader[name], pack, unpack)
            tensors |= {f"{module}.{key}": value for key, value in packed.items()}
        writer.write_shard(f"model-{number:05d}.safetensors", tensors)
    config["quantization_config"] = configuration
    writer.finish(config, source.checkpoint, source.logical_parameters)


def schemes(source: Source) -> dict[str, WeightScheme]:
    """The grid of every matrix with codes, after a check that the container can hold them all.

    Raises:
        ModelError: it cannot, or codes fit no matrix.
    """
    reader = CheckpointReader(source.checkpoint)
    config = read_json(source.checkpoint / "config.json")
    unknown = [module for module in source.codes if f"{module}.weight" not in reader]
    if unknown:
        raise ModelError(f"{reader.folder} has no matrix {unknown[0]}.weight to hold its codes")
    found = {module: scheme_of(source.codes, module) for module in source.codes}
    model_type = str(config.get("model_type"))
    problems = container_problems(targets(reader, found, config), source.container, model_type)
    if problems:
        raise ModelError(problems[0])
    return found


def dense_modules(source: Source) -> list[str]:
    """Linear layers that stay dense, by name; the head also where it is tied."""
    reader = CheckpointReader(source.checkpoint)
    config = read_json(source.checkpoint / "config.json")
    kinds = {target.name: target.kind for target in targets(reader, {}, config)}
    dense = {name for name, kind in kinds.items() if kind != "embedding"} - set(source.codes)
    if not any(name.rpartition(".")[2] in _HEADS for name in source.codes):
        dense.add("lm_head")
    return sorted(dense)


def _checked(
    module: str, quantized: QTensor, dense: Tensor, pack: Pack, unpack: Unpack
) -> dict[str, Tensor]:
    """Packed tensors that give back the same codes and zero-points."""
    if not torch.equal(quantized.dequantize(), dense):
        raise VerificationError(f"{module}.weight was changed after it was rounded to its codes")
    packed = pack(quantized)
    again = unpack(packed)
    zero = 0 if quantized.zero_point is None else quantized.zero_point
    other = 0 if again.zero_point is None else again.zero_point
    same_zero = torch.equal(
        *(torch.as_tensor(z).expand(quantized.scale.shape) for z in (zero, other))
    )
    if not torch.equal(again.codes, quantized.codes) or not same_zero:
        raise VerificationError(f"packing lost codes of {module}")
    return {name: tensor.contiguous() for name, tensor in packed.items()}


def read_words(
    folder: Path, unpack: Callable[[str, Tensors], QTensor]
) -> Iterator[tuple[str, Tensor]]:
    """Every dense tensor of a packed checkpoint, from its files alone.

    Matrices are multiplied out in the dtype of the model, as `QTensor.dequantize` does.
    """
    reader = CheckpointReader(folder)
    config = read_json(folder / "config.json")
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    dtype = getattr(torch, name.removeprefix("torch."))
    for name in reader.names():
        module, _, leaf = name.rpartition(".")
        if leaf == "qweight":
            parts = {key: f"{module}.{key}" for key in PACKED}
            stored = {key: reader[full] for key, full in parts.items() if full in reader}
            quantized = unpack(module, stored)
            scale = quantized.scale.to(dtype)
            yield (
                f"{module}.weight",
                QTensor(
                    quantized.codes, scale, quantized.zero_point, quantized.scheme
                ).dequantize(),
            )
        elif leaf not in PACKED:
            yield name, reader[name]
