from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compressor.formats.codes import CodesReader, codes_name, write_codes
from compressor.formats.headers import read_json
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.types import QTensor, WeightScheme

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def round_to_grid(weight: Tensor, scheme: WeightScheme) -> QTensor:
    """Round to nearest on a min-max grid: a rounder for tests of formats, not of rounding."""
    out, in_features = weight.shape
    low, high = scheme.code_range
    groups = weight.float().view(out, scheme.groups(in_features), -1)
    zero = torch.zeros(groups.shape[:2])
    if scheme.symmetry == "asymmetric":
        least, most = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = ((most - least) / (high - low)).to(weight.dtype)
        zero = (low - least / scale.float()).round().clamp(low, high)
    elif scheme.symmetry == "full_range":
        extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))[..., 0]
        scale = (extreme / low).to(weight.dtype)
    else:
        scale = (groups.abs().amax(-1) / high).to(weight.dtype)
    codes = (groups / scale.float()[..., None] + zero[..., None]).round().clamp(low, high)
    asymmetric = scheme.symmetry == "asymmetric"
    return QTensor(
        codes.to(torch.int8).view(out, in_features),
        scale,
        zero.to(torch.int8) if asymmetric else None,
        scheme,
    )


def quantize_checkpoint(
    base: Path, out: Path, choose: Callable[[str], WeightScheme | None]
) -> tuple[Path, CodesReader]:
    """Dense checkpoint of dequantized weights and, beside it, its codes."""
    reader, writer = CheckpointReader(base), CheckpointWriter(out)
    tensors: dict[str, Tensor] = {}
    codes: dict[str, QTensor] = {}
    for name, tensor in reader.items():
        module = name.removesuffix(".weight")
        scheme = choose(module) if name.endswith(".weight") and tensor.ndim == 2 else None
        if scheme is not None:
            codes[module] = round_to_grid(tensor, scheme)
        tensors[name] = codes[module].dequantize() if scheme is not None else tensor
    writer.write_shard(shard_name(0), tensors)
    writer.finish(read_json(base / "config.json"), base, logical_parameters=1)
    write_codes(out / "codes" / codes_name(0), codes)
    return out, CodesReader(out / "codes")


def tiny_model(name: str, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(7)
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    return getattr(transformers, f"{name}ForCausalLM")(config).to(dtype)


def logits(folder: Path, **options: Any) -> Tensor:
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=options.pop("dtype", "auto"), output_loading_info=True, **options
    )
    assert not any(info.values()), info
    with torch.no_grad():
        result: Tensor = model.eval()(torch.arange(32).view(1, 32)).logits
    return result


def same_tensors(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name])
        for name in left
    )
