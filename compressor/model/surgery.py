"""Cut units out of a model, exactly: what is kept keeps its bytes.

A unit of the feed-forward half is a channel: a row of what computes it and a column of what reads
it. A unit of attention is a query head (rows of q, columns of o), and with its last query head a
key-value head goes too. Kept units stay in order, so that heads stay beside the key-value head
that they share. An expert is all of its matrices and a row of the router.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from compressor.model.architecture import Architecture
from compressor.model.matrices import Matrix
from compressor.model.quiet import quiet
from compressor.model.shape import PER_LAYER, Shape, resized

_UP = ("gate", "up", "fc_in")
_DOWN = ("down", "fc_out")
_WRITERS = ("o", *_DOWN)


@dataclass(frozen=True)
class BlockKeep:
    """What stays of one block; None, or an expert that is absent, means everything.

    Attributes:
        heads: query heads, ascending; the same number for every key-value head that stays.
        kv_heads: key-value heads, ascending.
        channels: channels, ascending, by expert (None where there are no experts).
    """

    heads: Sequence[int] | None = None
    kv_heads: Sequence[int] | None = None
    channels: Mapping[int | None, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class PruningPlan:
    """What stays of a model.

    Attributes:
        layers: blocks, ascending.
        blocks: what stays of each; a block that is absent stays whole.
    """

    layers: Sequence[int]
    blocks: Mapping[int, BlockKeep] = field(default_factory=dict)


def apply(
    architecture: Architecture, plan: PruningPlan, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """All tensors of the smaller model, under its names, from those of the model on disk."""
    inside = f"{architecture.blocks_path}."
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(inside)}
    for new, old in enumerate(plan.layers):
        prefix = f"{inside}{old}."
        block = {name: tensors[name] for name in tensors if name.startswith(prefix)}
        block = cut_block(architecture, old, plan.blocks.get(old, BlockKeep()), block)
        kept |= {moved(architecture, name, new): tensor for name, tensor in block.items()}
    return kept


def cut_block(
    architecture: Architecture, index: int, keep: BlockKeep, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a block without the units that go; those not concerned are passed on."""
    found = dict(tensors)
    for matrix in architecture.block(index):
        rows, columns = (
            kept_rows(architecture, matrix, keep),
            kept_columns(architecture, matrix, keep),
        )
        out, in_ = (1, 0) if matrix.transposed_on_disk else (0, 1)
        for kept, dimension in ((rows, out), (columns, in_)):
            if kept is not None:
                found[matrix.tensor] = _select(found[matrix.tensor], dimension, kept)
        bias = f"{matrix.name}.bias"
        if rows is not None and bias in found:
            found[bias] = _select(found[bias], 0, rows)
    return found


def kept_stream(
    architecture: Architecture,
    kept: Sequence[int],
    factors: Mapping[str, float],
    tensors: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Tensors with some channels of the residual stream alone.

    Args:
        architecture: of the model on disk, whose halves read a norm of the stream.
        kept: channels that stay, ascending.
        factors: by name of a norm of the stream, what its weight is multiplied by.
        tensors: some of the model's.
    """
    matrices = {matrix.tensor: matrix for matrix in architecture.matrices}
    biases = {f"{m.name}.bias" for m in architecture.matrices if m.role in _WRITERS}
    found = {}
    for name, tensor in tensors.items():
        if name in factors:
            weight = _select(tensor, 0, kept)
            found[name] = (weight.double() * factors[name]).to(tensor.dtype)
        elif name in biases:
            found[name] = _select(tensor, 0, kept)
        elif name in matrices:
            found[name] = _select(tensor, 0 if matrices[name].role in _WRITERS else 1, kept)
        else:
            found[name] = tensor
    return found


def expert_names(architecture: Architecture, index: int, experts: Sequence[int]) -> dict[str, str]:
    """Names of the tensors of a block's experts that stay, with the names that they get.

    Args:
        architecture: of the model on disk.
        index: of the block.
        experts: that stay, ascending; they are numbered anew from 0.
    """
    place = {old: new for new, old in enumerate(experts)}
    return {
        matrix.tensor: matrix.tensor.replace(
            f".experts.{matrix.expert}.", f".experts.{place[matrix.expert]}."
        )
        for matrix in architecture.block(index)
        if matrix.expert in place
    }


def kept_experts(
    architecture: Architecture, index: int, experts: Sequence[int], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The tensors of a block with these experts alone; their rows are all that the router keeps."""
    names = expert_names(architecture, index, experts)
    matrices = {matrix.tensor: matrix for matrix in architecture.block(index)}
    found = {}
    for name, tensor in tensors.items():
        matrix = matrices.get(name)
        if matrix is not None and matrix.role == "router":
            found[name] = _select(tensor, 0, experts)
        elif matrix is None or matrix.expert is None:
            found[name] = tensor
        elif name in names:
            found[names[name]] = tensor
    return found


def kept_rows(architecture: Architecture, matrix: Matrix, keep: BlockKeep) -> list[int] | None:
    """Rows (outputs) of a matrix that stay; None for all."""
    if matrix.role in ("q", "k", "v", "qkv"):
        return _attention_rows(architecture, matrix, keep)
    channels = keep.channels.get(matrix.expert)
    if channels is None or matrix.role not in (*_UP, "gate_up"):
        return None
    if matrix.role in _UP:
        return list(channels)
    half = matrix.shape[0] // 2
    return [*channels, *(half + channel for channel in channels)]


def _attention_rows(
    architecture: Architecture, matrix: Matrix, keep: BlockKeep
) -> list[int] | None:
    size = architecture.head_dim
    queries = None if keep.heads is None else _runs(keep.heads, size)
    keys = None if keep.kv_heads is None else _runs(keep.kv_heads, size)
    if matrix.role == "q":
        return queries
    if matrix.role != "qkv":
        return keys
    if queries is None and keys is None:
        return None
    query, kv = architecture.heads * size, architecture.kv_heads * size
    queries = list(range(query)) if queries is None else queries
    keys = list(range(kv)) if keys is None else keys
    return [*queries, *(query + row for row in keys), *(query + kv + row for row in keys)]


def kept_columns(architecture: Architecture, matrix: Matrix, keep: BlockKeep) -> list[int] | None:
    """Columns (inputs) of a matrix that stay; None for all."""
    if matrix.role == "o" and keep.heads is not None:
        return _runs(keep.heads, architecture.head_dim)
    channels = keep.channels.get(matrix.expert)
    return list(channels) if matrix.role in _DOWN and channels is not None else None


def moved(architecture: Architecture, name: str, index: int) -> str:
    """The name of a block's tensor when the block is number `index`."""
    path = f"{architecture.blocks_path}."
    _, _, rest = name.removeprefix(path).partition(".")
    return f"{path}{index}.{rest}"


def pruned_config(
    checkpoint: Path, architecture: Architecture, shape: Shape, layers: Sequence[int]
) -> dict[str, Any]:
    """`config.json` of the smaller model.

    Args:
        checkpoint: of the parent; says which pattern over blocks its family has by default.
        architecture: the parent.
        shape: sizes of the smaller model.
        layers: blocks that stay, ascending.
    """
    config = dict(resized(architecture, shape).config)
    if len(layers) == architecture.layers:
        return config
    with quiet():
        full = transformers.AutoConfig.from_pretrained(checkpoint, local_files_only=True).to_dict()
    for key in PER_LAYER:
        values = full.get(key)
        if isinstance(values, list) and len(values) == architecture.layers:
            config[key] = [values[layer] for layer in layers]
    if isinstance(below := config.get("max_window_layers"), int):
        config["max_window_layers"] = sum(layer < below for layer in layers)
    return config


def _select(tensor: Tensor, dimension: int, kept: Iterable[int]) -> Tensor:
    index = torch.tensor(list(kept), dtype=torch.int64, device=tensor.device)
    return tensor.index_select(dimension, index)


def _runs(units: Iterable[int], size: int) -> list[int]:
    """Members of units of `size` neighbours."""
    return [member for unit in units for member in range(unit * size, (unit + 1) * size)]
