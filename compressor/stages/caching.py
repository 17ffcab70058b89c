"""The work of `quantize.kv`: walk once, see how far keys and values reach, write the scales."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.formats.atomic import atomic_write_json
from compressor.formats.files import link_checkpoint
from compressor.formats.shards import TORCH_DTYPES
from compressor.formats.sizes import STORED
from compressor.model.block import Block
from compressor.model.cache import enter_cache
from compressor.model.files import read_config
from compressor.model.serving import cache_config
from compressor.model.walk import BlockWalk
from compressor.numerics.cache import cache_scale
from compressor.stages.context import StageContext
from compressor.types import BlockRecord, CacheScheme, Fallback, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.quantize_kv import QuantizeKv

_KEYS, _VALUES = "largest_key", "largest_value"


def scale_cache(
    stage: QuantizeKv, checkpoint: Path, batches: Sequence[TokenBatch], context: StageContext
) -> StageResult:
    """The same checkpoint with scales of its cache in `config.json`.

    Args:
        stage: how much room the scales leave.
        checkpoint: the parent, a plain Hugging Face directory.
        batches: calibration tokens.
        context: where to work and whom to tell.

    Raises:
        NumericalError: a key or a value is not finite.
    """
    walk = context.walk(checkpoint, batches)
    records = list(context.finished)
    with context.observer.task("measuring blocks", walk.architecture.layers) as task:
        task.advance(len(records))
        for block in walk.blocks(len(records)):
            record = _measured(block, walk)
            block.save_outputs()
            context.block_done(record)
            records.append(record)
            task.advance()
    scheme = CacheScheme(tuple(_scales(stage, walk, record) for record in records))
    link_checkpoint(checkpoint, context.folder)
    config = cache_config(read_config(checkpoint), scheme)
    atomic_write_json(context.folder / "config.json", config)
    return StageResult(
        checkpoint=context.folder,
        changed=(),
        fallbacks=tuple(fallback for record in records for fallback in record.fallbacks),
        notes={name: max(record.notes[name] for record in records) for name in (_KEYS, _VALUES)},
    )


def _scales(stage: QuantizeKv, walk: BlockWalk, record: BlockRecord) -> tuple[float, float]:
    """Of keys and values, as numbers of the checkpoint's dtype."""
    dtype = TORCH_DTYPES[STORED[walk.architecture.dtype]]
    keys, values = (
        cache_scale(record.notes[name], dtype, stage.headroom) for name in (_KEYS, _VALUES)
    )
    return keys, values


class _Largest:
    """Largest magnitudes of keys and values, without those of padding; all pass unchanged."""

    def __init__(self) -> None:
        self.keys = self.values = 0.0
        self.mask = torch.ones(1, 1, dtype=torch.bool)

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        self.keys = max(self.keys, self._of(keys))
        self.values = max(self.values, self._of(values))
        return keys, values

    def _of(self, states: Tensor) -> float:
        """Of states [batch, heads, length, head_dim]."""
        rows = states.transpose(1, 2)[self.mask.to(states.device)]
        largest = float(rows.abs().amax()) if rows.numel() else 0.0
        if not largest < float("inf"):
            raise NumericalError("a key or a value of the calibration text is not finite")
        return largest


def _measured(block: Block, walk: BlockWalk) -> BlockRecord:
    """Run a block on all text, which leaves what enters the next one."""
    path = walk.architecture.cached_attention[block.index]
    inside = path.removeprefix(f"{walk.architecture.blocks_path}.{block.index}.")
    largest = _Largest()
    handle = enter_cache(block.module.get_submodule(inside), largest)
    for batch, tokens in enumerate(walk.batches):
        largest.mask = tokens.mask
        block.capture(_ignore, (), [batch], onward=True)
    handle.remove()
    notes = {_KEYS: largest.keys, _VALUES: largest.values}
    zero = [name for name in notes if notes[name] == 0]
    return BlockRecord(
        block.index,
        fallbacks=tuple(Fallback(path, f"{name} is zero on all text", "scale 1") for name in zero),
        notes=notes,
    )


def _ignore(_: str, __: Tensor, ___: Tensor) -> None:
    """No input of a matrix is asked for."""
