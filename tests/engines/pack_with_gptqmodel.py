"""Runs inside GPTQModel's own environment: packs matrices with its own packers.

python pack_with_gptqmodel.py GIVEN.safetensors PACKED.safetensors

A matrix is given as `NAME.weight` [out, in], `NAME.scale` and `NAME.zero` [out, groups], and a line
of metadata `NAME: method bits group_size`. Knows nothing of this package.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module
from safetensors import safe_open
from safetensors.torch import save_file


def main() -> None:
    """Pack all of a file."""
    packed = {}
    with safe_open(sys.argv[1], "pt") as given:
        for name, what in given.metadata().items():
            method, bits, group_size = what.split()
            parts = [given.get_tensor(f"{name}.{part}") for part in ("weight", "scale", "zero")]
            for key, value in pack(method, int(bits), int(group_size), *parts).items():
                packed[f"{name}.{key}"] = value.contiguous()
    save_file(packed, sys.argv[2])


def pack(
    method: str,
    bits: int,
    group_size: int,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
) -> dict[str, torch.Tensor]:
    """The words of one matrix, as GPTQModel would save them.

    Args:
        method: `awq`, or a packer of GPTQ and its version: `block-v1`, `original-v2`.
        zero: unsigned zero-points.
    """
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False)
    linear.weight.data = weight
    if method == "awq":
        module = made(AwqTorchLinear, bits, group_size, linear)
        module.pack(linear, scale, zero)
        return {key: getattr(module, key) for key in ("qweight", "qzeros", "scales")}
    packer, _, version = method.partition("-")
    module = made(TorchLinear, bits, group_size, linear)
    groups = (torch.arange(weight.shape[1]) // group_size).to(torch.int32)
    getattr(module, f"pack_{packer}")(linear, scale, zero, groups)
    if version == "v1":
        convert_gptq_v2_to_v1_format_module(module, QuantizeConfig(bits=bits))
    return {key: getattr(module, key) for key in ("qweight", "qzeros", "scales", "g_idx")}


def made(kind: type, bits: int, group_size: int, linear: torch.nn.Linear) -> Any:
    """A module of GPTQModel to be filled."""
    return kind(
        bits=bits,
        group_size=group_size,
        sym=False,
        desc_act=False,
        in_features=linear.in_features,
        out_features=linear.out_features,
        bias=False,
        pack_dtype=torch.int32,
    )


if __name__ == "__main__":
    main()
