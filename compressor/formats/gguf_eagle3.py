"""EAGLE-3 heads as GGUF files, for llama.cpp's `--spec-type draft-eagle3`.

The file holds the tensors of the flat dialect under llama.cpp's names, the target's tokenizer, and
which entries of `hidden_states` are fused (`eagle3.target_layers`, counted as transformers counts
them). `d2t` becomes the token of the target itself in place of the distance to it. Embedding, and
nothing else, is the target's. Layout as in llama.cpp's converter (`conversion/llama.py`) and loader
(`src/models/eagle3.cpp`); tests compare with the former and decode with the latter.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from compressor.formats.atomic import replacing
from compressor.formats.eagle3 import FLAT, default_layers
from compressor.formats.gguf import (
    FILE,
    FILE_TYPES,
    FLOATS,
    gguf_name,
    hugging_face_name,
    llama_heads,
    row_order,
)
from compressor.formats.gguf_metadata import add_metadata, check
from compressor.formats.headers import read_json
from compressor.formats.shards import CheckpointReader

__all__ = ["FILE", "read", "write"]

ARCHITECTURE = "eagle3"
_BLOCK = "model.layers.0."
_OWN = {
    "fc.weight": "fc.weight",
    "norm.weight": "output_norm.weight",
    f"{FLAT}hidden_norm.weight": "blk.0.attn_norm_2.weight",
    "d2t": "d2t",
}
_TARGETS_OWN = "t2d"  # which tokens the head can propose; follows from d2t


def write(draft: Path, target: Path, out: Path) -> None:
    """Write `model.gguf` of a head.

    Args:
        draft: its folder, in the flat dialect.
        target: checkpoint that it reads features of; its tokenizer goes into the file.
        out: folder to write.

    Raises:
        ModelError: positions or tokenizer are of a kind that is not written.
        ResourceError: the file system refused.
    """
    reader, config = CheckpointReader(draft), read_json(draft / "config.json")
    check(target)
    heads, dtype = llama_heads(config), reader.dtype("fc.weight")
    with replacing(out / FILE) as temporary:
        writer = gguf.GGUFWriter(temporary, ARCHITECTURE)
        add_metadata(writer, draft, FILE_TYPES[FLOATS[dtype]], dtype, tokenizer=target)
        _add_features(writer, config, read_json(target / "config.json"))
        for name in reader:
            if name != _TARGETS_OWN:
                _add(writer, _stored_name(name), _stored(name, reader[name], heads))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _add_features(writer: gguf.GGUFWriter, config: dict[str, Any], target: dict[str, Any]) -> None:
    layers = int(target["num_hidden_layers"])
    features = config.get("eagle_aux_hidden_state_layer_ids") or default_layers(layers)
    writer.add_array(f"{ARCHITECTURE}.target_layers", [int(entry) for entry in features])
    writer.add_uint32(f"{ARCHITECTURE}.target_hidden_size", int(target["hidden_size"]))
    writer.add_bool(f"{ARCHITECTURE}.norm_before_residual", False)
    writer.add_bool(f"{ARCHITECTURE}.norm_before_fc", False)


def _stored_name(name: str) -> str:
    if name in _OWN:
        return _OWN[name]
    return gguf_name(_BLOCK + name.removeprefix(FLAT) if name.startswith(FLAT) else name)


def _stored(name: str, tensor: Tensor, heads: dict[str, int]) -> Tensor:
    """As it lies in the file: vectors in fp32, tokens instead of distances, rows in pairs."""
    if name == "d2t":
        return tensor + torch.arange(len(tensor))
    if tensor.ndim == 1:
        return tensor.float()
    order = row_order(name, len(tensor), heads)
    return tensor if order is None else tensor[order]


def _add(writer: gguf.GGUFWriter, name: str, tensor: Tensor) -> None:
    kind = "I64" if tensor.dtype == torch.int64 else FLOATS[tensor.dtype]
    if tensor.dtype != torch.bfloat16:
        writer.add_tensor(name, tensor.contiguous().numpy())
        return
    data = tensor.contiguous().view(torch.uint8).numpy()  # numpy has no bf16
    writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType[kind])


def read(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a head by its flat name, but for `t2d`, from its GGUF file alone."""
    reader = gguf.GGUFReader(folder / FILE)
    fields = {key: field.contents() for key, field in reader.fields.items()}
    own = {stored: name for name, stored in _OWN.items()}
    heads = llama_heads(
        {
            "num_attention_heads": fields[f"{ARCHITECTURE}.attention.head_count"],
            "num_key_value_heads": fields[f"{ARCHITECTURE}.attention.head_count_kv"],
        }
    )
    for stored in reader.tensors:
        name = own.get(stored.name) or hugging_face_name(stored.name).replace(_BLOCK, FLAT)
        yield name, _flat(name, _tensor(stored), heads)


def _flat(name: str, stored: Tensor, heads: dict[str, int]) -> Tensor:
    """Inverse of `_stored`."""
    if name == "d2t":
        return stored - torch.arange(len(stored))
    order = row_order(name, len(stored), heads)
    return stored if order is None else stored[order.argsort()]


def _tensor(stored: Any) -> Tensor:
    data = torch.from_numpy(np.ascontiguousarray(stored.data).copy())
    if stored.tensor_type.name != "BF16":
        return data
    return data.view(torch.uint8).view(torch.bfloat16)
