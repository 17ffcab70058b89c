"""Packed integers of GPTQModel and auto-round, as those wrote them, back to a plain checkpoint.

transformers needs the gptqmodel package to load these, and that needs another torch than ours.
The layout is public: `qweight` int32 holds the codes of one output column as a stream of bits
along the input, lowest first (3-bit codes run across words); `scales` [groups, out]; `qzeros`
int32 holds the zero-points as a stream along the output; `g_idx` gives the group of every input.
The v1 layout stores zero-points less one. A weight is scale · (code - zero-point), in fp32.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

_PACKED = ("qweight", "qzeros", "scales", "g_idx")


def unpack(words: NDArray[np.int32], bits: int) -> NDArray[np.int32]:
    """Streams of `bits`-wide codes along the first axis: int32 [n, m] -> [32 n / bits, m]."""
    stream = np.unpackbits(np.ascontiguousarray(words.T).view(np.uint8), axis=1, bitorder="little")
    codes = stream.reshape(words.shape[1], -1, bits) @ (1 << np.arange(bits, dtype=np.int32))
    return codes.T


def dequantize(tensors: dict[str, Tensor], bits: int, *, less_one: bool) -> Tensor:
    """The weight, float32 [out, in].

    Args:
        tensors: `qweight`, `qzeros`, `scales` and, if the columns were reordered, `g_idx`.
        bits: width of a code.
        less_one: zero-points are stored less one (layout v1).
    """
    codes = unpack(tensors["qweight"].numpy(), bits)  # [in, out]
    scales = tensors["scales"].float().numpy()  # [groups, out]
    zeros = unpack(np.ascontiguousarray(tensors["qzeros"].numpy().T), bits).T[:, : scales.shape[1]]
    zeros = (zeros + 1) & ((1 << bits) - 1) if less_one else zeros
    if "g_idx" in tensors:
        group = tensors["g_idx"].long().numpy()
    else:
        group = np.arange(len(codes)) // (len(codes) // len(scales))
    weight = scales[group] * (codes - zeros[group]).astype(np.float32)
    return torch.from_numpy(weight.T.copy())


def stores_less_one(config: dict[str, Any]) -> bool:
    """Whether a checkpoint's zero-points are those of layout v1."""
    form = config.get("checkpoint_format") or config.get("packing_format") or "gptq"
    return str(form).rpartition(":")[2] in {"gptq", "auto_gptq"}


def write_dense(packed: Path, base: Path, out: Path) -> None:
    """A float32 checkpoint with the weights that `packed` stands for.

    Args:
        packed: what the peer saved.
        base: the original; its configuration and tokenizer are kept.
        out: folder to make.
    """
    config = json.loads((packed / "config.json").read_text())["quantization_config"]
    tensors = dict(_dense_tensors(packed, config["bits"], less_one=stores_less_one(config)))
    out.mkdir(parents=True, exist_ok=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, out)
    plain = json.loads((base / "config.json").read_text()) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(plain))
    save_file(tensors, out / "model.safetensors", {"format": "pt"})


def _dense_tensors(folder: Path, bits: int, *, less_one: bool) -> Iterator[tuple[str, Tensor]]:
    stored = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            stored |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        if kind == "qweight":
            parts = {part: stored[f"{module}.{part}"] for part in _PACKED
                     if f"{module}.{part}" in stored}  # fmt: skip
            yield f"{module}.weight", dequantize(parts, bits, less_one=less_one)
        elif kind not in _PACKED:
            yield name, tensor.float()
