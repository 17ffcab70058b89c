"""Export to compressed-tensors: the stored codes, packed by the format's own library.

Nothing is rounded here. The codes a rounder left are packed, unpacked again and compared, and
the library's own decompression of what is written must give the dense weights bit for bit.

Loading: `AutoModelForCausalLM.from_pretrained(folder, dtype="auto")`. With another dtype
transformers casts the scales before it multiplies, and the weights differ from the dense
checkpoint's by rounding (exports marked `dequantize` multiply first and agree in any dtype).
Three progress bars are the library's; `TQDM_DISABLE=1` silences them. Weights are dense in
memory after the first forward pass: the export saves disk and bandwidth, not memory, there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized.helpers import (
    pack_to_int32,
    unpack_from_int32,
)
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from torch import Tensor

from compressor.errors import ModelError, VerificationError
from compressor.formats.exporters import Source
from compressor.formats.headers import read_json
from compressor.formats.shards import SHARD_BYTES, CheckpointReader, CheckpointWriter, plan_shards
from compressor.formats.support import (
    SCALED_EMBEDDINGS,
    Form,
    Format,
    Kind,
    Target,
    export_problems,
    format_of,
    layout_of,
    loads_beside_others,
    needs_dequantize,
)
from compressor.types import ActivationScheme, QTensor, WeightScheme

_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings", "embed_in", "embed_positions")
_HEADS = ("lm_head", "embed_out")
_ROUTERS = ("gate", "router")


def write(source: Source, out: Path) -> None:
    """Write a compressed-tensors checkpoint; see `export`."""
    export(
        source.checkpoint,
        source.codes,
        out,
        logical_parameters=source.logical_parameters,
        form=source.container,  # type: ignore[arg-type]
        activations=source.activations,
        cache=source.cache,
    )


def export(
    checkpoint: Path,
    codes: Mapping[str, QTensor],
    out: Path,
    *,
    logical_parameters: int,
    form: Form = "auto",
    activations: Mapping[str, ActivationScheme] | None = None,
    cache: Mapping[str, tuple[float, float]] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a compressed-tensors checkpoint, shard by shard; run again, it resumes.

    Args:
        checkpoint: dense checkpoint whose quantized matrices equal `QTensor.dequantize()`.
        codes: module name (matrix on disk without `.weight`) to codes.
        out: folder of the export.
        logical_parameters: weights of the model, ties once.
        form: `pack-quantized`, `int-quantized`, or `auto` by the scheme of each matrix.
        activations: how the inputs of matrices are rounded, by module name; others are not.
        cache: scales of keys and of values, by attention module, in numbers of the checkpoint's
            dtype; none where the cache is not rounded.
        shard_bytes: dense bytes per shard.

    Raises:
        ModelError: codes that fit no matrix, or a combination that would not load.
        VerificationError: dense weights and codes disagree, or packing lost a code.
        ResourceError: the file system refused.
    """
    reader, writer = CheckpointReader(checkpoint), CheckpointWriter(out)
    config = read_json(checkpoint / "config.json")
    config.pop("compressor", None)  # what serving does is said in the format's own words
    quantized = _check(reader, codes, config, form, activations or {})
    for number, names in enumerate(plan_shards(reader, shard_bytes), start=1):
        shard = f"model-{number:05d}.safetensors"
        if not writer.has_shard(shard):
            tensors = _compress_shard(reader, codes, names, quantized, form)
            writer.write_shard(shard, tensors | _cache_scales(reader, names, cache or {}))
    config["quantization_config"] = quantization_config(quantized, reader, form, bool(cache))
    writer.finish(config, checkpoint, logical_parameters)


def _check(
    reader: CheckpointReader,
    codes: Mapping[str, QTensor],
    config: Mapping[str, Any],
    form: Form,
    activations: Mapping[str, ActivationScheme],
) -> dict[str, Target]:
    """The quantized matrices by module name."""
    if "quantization_config" in config:
        raise ModelError(f"{reader.folder} is quantized already; export starts from dense weights")
    unknown = [module for module in codes if f"{module}.weight" not in reader]
    if unknown:
        raise ModelError(f"{reader.folder} has no matrix {unknown[0]}.weight to hold its codes")
    unrounded = sorted(set(activations) - set(codes))
    if unrounded:
        raise ModelError(f"the inputs of {unrounded[0]} are rounded, but it has no codes itself")
    schemes = {module: scheme_of(codes, module) for module in codes}
    found = targets(reader, schemes, config, activations)
    problems = export_problems(found, form)
    if problems:
        raise ModelError(problems[0])
    return {target.name: target for target in found if target.scheme is not None}


def scheme_of(codes: Mapping[str, QTensor], module: str) -> WeightScheme:
    """The grid of a module; codes that are on disk stay there."""
    lazily = getattr(codes, "scheme", None)  # a CodesReader knows it without reading codes
    scheme: WeightScheme = lazily(module) if lazily else codes[module].scheme
    return scheme


def targets(
    reader: CheckpointReader,
    schemes: Mapping[str, WeightScheme],
    config: Mapping[str, Any],
    activations: Mapping[str, ActivationScheme] | None = None,
) -> list[Target]:
    """Every matrix of a checkpoint as `support` sees it."""
    rounded = activations or {}
    found = []
    for name in reader.names():
        shape = reader.shape(name)
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and len(shape) == 2:
            kind = matrix_kind(module, config)
            sizes = (shape[0], shape[1])
            scheme, inputs = schemes.get(module), rounded.get(module)
            scaled = kind == "embedding" and config.get("model_type") in SCALED_EMBEDDINGS
            found.append(Target(module, sizes, kind, scheme, inputs, scaled))
    return found


def matrix_kind(module: str, config: Mapping[str, Any]) -> Kind:
    """What a two-dimensional weight is, by the naming conventions of Hugging Face models."""
    leaf = module.rpartition(".")[2]
    if leaf in _EMBEDDINGS:
        return "embedding"
    if leaf in _HEADS:
        return "head"
    if ".experts." in module:
        return "expert"
    if leaf in _ROUTERS:
        return "router"
    return "conv1d" if config.get("model_type") == "gpt2" else "linear"


def _compress_shard(
    reader: CheckpointReader,
    codes: Mapping[str, QTensor],
    names: Sequence[str],
    quantized: Mapping[str, Target],
    form: Form,
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name in names:
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module in codes:
            layout = layout_of(quantized[module], form)
            packed = _compress_verified(module, codes[module], reader[name], layout)
            tensors |= {f"{module}.{key}": value for key, value in packed.items()}
            if _serves_head(quantized[module], reader, form):
                tensors["lm_head.weight_scale"] = packed["weight_scale"].clone()
        else:
            tensors[name] = reader[name]
    return tensors


def _cache_scales(
    reader: CheckpointReader, names: Sequence[str], cache: Mapping[str, tuple[float, float]]
) -> dict[str, Tensor]:
    """`k_scale` and `v_scale` [1] of attention modules, beside what computes their keys."""
    scales: dict[str, Tensor] = {}
    for name in names:
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if module in cache and leaf in ("k_proj", "qkv_proj") and name.endswith(".weight"):
            for part, scale in zip("kv", cache[module], strict=True):
                scales[f"{module}.{part}_scale"] = torch.tensor([scale], dtype=reader[name].dtype)
    return scales


def compress(quantized: QTensor, form: Format = "pack-quantized") -> dict[str, Tensor]:
    """The tensors that hold one matrix, by their names within the module.

    Args:
        quantized: codes [out, in] with scales [out, groups].
        form: pack-quantized gives `weight_packed` int32 [out, ceil(in·bits/32)], lowest bits
            first, `weight_shape` int64 [2] and, if asymmetric, `weight_zero_point` int32
            [ceil(out·bits/32), groups]; int-quantized gives `weight` int8 [out, in] and
            `weight_zero_point` int8 [out, groups]. Both give `weight_scale` [out, groups].
            float-quantized gives `weight` fp8 [out, in] and `weight_scale` [out / rows, groups];
            the two of fp4 give `weight_packed` uint8 [out, in / 2], first code lowest, and
            `weight_scale` of a byte, NVFP4 also `weight_global_scale` fp32 [1].
    """
    if quantized.scheme.number == "float":
        return _compress_floats(quantized)
    tensors = {"weight_scale": quantized.scale}
    zero_point, bits = quantized.zero_point, quantized.scheme.bits
    if form == "int-quantized":
        tensors["weight"] = quantized.codes
        return tensors if zero_point is None else {**tensors, "weight_zero_point": zero_point}
    tensors["weight_packed"] = pack_to_int32(quantized.codes, bits)
    tensors["weight_shape"] = torch.tensor(quantized.codes.shape, dtype=torch.int64)
    if zero_point is not None:
        tensors["weight_zero_point"] = pack_to_int32(zero_point, bits, packed_dim=0)
    return tensors


def _compress_floats(quantized: QTensor) -> dict[str, Tensor]:
    numbers, scale = quantized.numbers(), quantized.scale
    if quantized.scheme.bits == 8:
        return {"weight": numbers.to(torch.float8_e4m3fn), "weight_scale": scale}
    packed = pack_fp4_to_uint8(numbers.bfloat16())
    if quantized.divisor is None:
        exponents = compress_mx_scale(scale.float(), torch.uint8)
        return {"weight_packed": packed, "weight_scale": exponents}
    return {
        "weight_packed": packed,
        "weight_scale": scale.to(torch.float8_e4m3fn),
        "weight_global_scale": quantized.divisor,
    }


def decompress(
    tensors: Mapping[str, Tensor], scheme: WeightScheme, form: Format = "pack-quantized"
) -> Tensor:
    """Dense weight [out, in] that the library makes of stored tensors, in the scales' dtype."""
    form = format_of(scheme, None, form)
    arguments = QuantizationScheme(targets=["Linear"], weights=_weight_arguments(scheme))
    compressor = BaseCompressor.get_value_from_registry(form)
    weight: Tensor = compressor.decompress(dict(tensors), arguments)["weight"]
    return weight


def _compress_verified(
    module: str, quantized: QTensor, dense: Tensor, form: Format
) -> dict[str, Tensor]:
    if quantized.scale.dtype != dense.dtype:
        raise ModelError(
            f"the scales of {module} are {quantized.scale.dtype} and the checkpoint is "
            f"{dense.dtype}; transformers casts scales to the checkpoint's dtype at load"
        )
    if not torch.equal(quantized.dequantize(), dense):
        raise VerificationError(f"{module}.weight was changed after it was rounded to its codes")
    tensors = compress(quantized, form)
    if form == "pack-quantized":
        bits, shape = quantized.scheme.bits, quantized.codes.shape
        if not torch.equal(
            unpack_from_int32(tensors["weight_packed"], bits, shape), quantized.codes
        ):
            raise VerificationError(f"packing lost codes of {module}: are they within {bits} bits?")
    if not torch.equal(decompress(tensors, quantized.scheme, form), dense):
        raise VerificationError(f"compressed-tensors reads {module} otherwise than it was rounded")
    return tensors


def _serves_head(target: Target, reader: CheckpointReader, form: Form) -> bool:
    """Whether the matrix is an embedding whose codes a tied head shares as a module of its own."""
    tied = not any(name.removesuffix(".weight").endswith(_HEADS) for name in reader.names())
    return tied and loads_beside_others(target, form)


@dataclass(frozen=True)
class _Group:
    """Everything that matrices share which stand together in the configuration."""

    weights: WeightScheme
    activations: ActivationScheme | None
    layout: Format


def quantization_config(
    quantized: Mapping[str, Target], reader: CheckpointReader, form: Form, cache: bool = False
) -> dict[str, Any]:
    """The `quantization_config` of `config.json`; `cache` says that keys and values are rounded.

    One scheme is written as target `Linear` with everything else ignored, which every engine
    reads; several as exact names, since engines that fuse layers would let `Linear` win.
    """
    groups = _groups(quantized, form)
    layouts = {group.layout for group in groups}
    embeddings = [name for name in quantized if name.rpartition(".")[2] in _EMBEDDINGS]
    shared = [name for name in embeddings if _serves_head(quantized[name], reader, form)]
    named = [*quantized, *(["lm_head"] if shared else [])]
    config: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "version": version("compressed-tensors"),
        "format": "mixed-precision" if len(layouts) > 1 else min(layouts, default="dense"),
        "quantization_status": "compressed",
        "ignore": _ignored(named, reader) if len(groups) == 1 else [],
        "kv_cache_scheme": _CACHE_ARGUMENTS.model_dump(mode="json") if cache else None,
        "config_groups": {
            f"group_{number}": _config_group(
                ["Linear", *sorted(embeddings)]
                if len(groups) == 1
                else _exact_targets(modules, shared),
                group,
            )
            for number, (group, modules) in enumerate(groups.items())
        },
    }
    if needs_dequantize(quantized.values(), form):
        config["dequantize"] = True
    return config


def _groups(quantized: Mapping[str, Target], form: Form) -> dict[_Group, list[str]]:
    """Modules by what they share, groups and modules by name."""
    groups: dict[_Group, list[str]] = defaultdict(list)
    for module in sorted(quantized):
        target = quantized[module]
        assert target.scheme is not None
        groups[_Group(target.scheme, target.activations, layout_of(target, form))].append(module)
    return dict(sorted(groups.items(), key=lambda item: item[1][0]))


def _ignored(quantized: Collection[str], reader: CheckpointReader) -> list[str]:
    matrices = [
        name.removesuffix(".weight")
        for name in reader.names()
        if name.endswith(".weight") and len(reader.shape(name)) == 2
    ]
    dense = set(matrices) - set(quantized)
    if not any(name.rpartition(".")[2] in _HEADS for name in quantized):
        # A tied head has no tensor of its own, and others have another name on disk (GPT-NeoX);
        # it is a Linear in the model all the same, which engines would try to quantize.
        dense.add("lm_head")
    return sorted(name for name in dense if name.rpartition(".")[2] not in _EMBEDDINGS)


def _exact_targets(modules: Sequence[str], shared: Collection[str]) -> list[str]:
    """Names for a group of the configuration; `shared` are embeddings with a tied head."""
    # Experts are no modules in transformers 5; it finds their scheme by a pattern naming them.
    experts = {module.rpartition(".")[2] for module in modules if ".experts." in module}
    patterns = [rf"re:.*\.experts\.\d+\.({'|'.join(sorted(experts))})$"] if experts else []
    # GPT-NeoX's head is `embed_out` on disk and `lm_head` in the model; engines want either.
    heads = ["lm_head"] if "embed_out" in modules or set(shared) & set(modules) else []
    return patterns + heads + [module for module in modules if ".experts." not in module]


def _weight_arguments(scheme: WeightScheme) -> QuantizationArgs:
    if scheme.number == "float":
        return _float_arguments(scheme)
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="int",
        symmetric=scheme.symmetry != "asymmetric",
        strategy="channel" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
    )


def _float_arguments(scheme: WeightScheme) -> QuantizationArgs:
    strategies = {"dense": "channel", "e8m0": "group", "e4m3": "tensor_group"}
    strategy = strategies[scheme.scales] if scheme.rows == 1 else "block"
    return QuantizationArgs(
        num_bits=scheme.bits,
        type="float",
        strategy=strategy,
        group_size=None if scheme.rows > 1 else scheme.group_size,
        block_structure=[scheme.rows, scheme.group_size] if scheme.rows > 1 else None,
        scale_dtype={"dense": None, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}[
            scheme.scales
        ],
    )


def _input_arguments(scheme: ActivationScheme) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=scheme.bits,
        type=scheme.number,
        symmetric=True,
        strategy="token" if scheme.group_size is None else "group",
        group_size=scheme.group_size,
        dynamic=True,
    )


_CACHE_ARGUMENTS = QuantizationArgs(
    num_bits=8, type="float", symmetric=True, strategy="tensor", dynamic=False
)


def _config_group(names: list[str], group: _Group) -> dict[str, Any]:
    inputs = group.activations
    written: dict[str, Any] = QuantizationScheme(
        targets=names,
        weights=_weight_arguments(group.weights),
        input_activations=None if inputs is None else _input_arguments(inputs),
        format=group.layout,
    ).model_dump(mode="json")
    return written
