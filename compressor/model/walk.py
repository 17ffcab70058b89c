"""Walk a checkpoint block by block: one block in memory, whatever the depth.

    walk = BlockWalk(checkpoint, batches, device=…, dtype=…, scratch=…, memory_budget=…)
    for block in walk.blocks():
        block.capture(observe)                  # inputs of every matrix, valid tokens only
        for matrix in block.matrices:
            matrix.set_weight(rounded)
        block.forward()                         # activations for the next block
        block.save_outputs()                    # a later walk can start behind this block
        write(block.state())
    logits = walk.logits(hidden) for hidden in walk.final_hidden()

Weights are computed with in `dtype` but stored as on disk: what `set_weight` takes is rounded
to the disk dtype first, so that the activations are those of the model that will be written.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor, nn

from compressor.errors import ModelError, ResumeError
from compressor.model.activations import ActivationStore
from compressor.model.architecture import ROOM_BESIDE_PARKED, Architecture, held_by_forward
from compressor.model.block import Block
from compressor.model.files import read_config
from compressor.model.lanes import Lanes
from compressor.model.matrices import Matrix
from compressor.model.memory import keep_memory, return_memory
from compressor.model.parking import ParkingLot
from compressor.model.reader import TensorReader
from compressor.model.skeleton import Skeleton
from compressor.types import ActivationScheme, TokenBatch

HEAD_TOKENS = 256
"""Whose logits are in memory at once."""


class BlockWalk:
    """A checkpoint with calibration text, opened block by block.

    Args:
        checkpoint: directory of a dense checkpoint of a known family.
        batches: what runs through the model, right-padded.
        device: where blocks are computed.
        dtype: in which they are computed.
        scratch: folder for activations beyond the budget and for those saved to resume.
        memory_budget: bytes of activations held in memory.
        activations: by matrix, how inputs are rounded beyond what the checkpoint asks for.
        parks: forwards that stand still without room in memory wait in a file of `scratch` instead
            of running anew. Observers then may keep what they are shown only until the next batch
            of the same lane.
        lanes: in which batches run that are run at the same time; one after another by default.

    Raises:
        ModelError: unknown family, compressed weights, or tensors that do not fit config.json.
    """

    def __init__(
        self,
        checkpoint: Path,
        batches: Sequence[TokenBatch],
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        scratch: Path,
        memory_budget: int = 1 << 30,
        activations: Mapping[str, ActivationScheme] | None = None,
        parks: bool = False,
        lanes: Lanes | None = None,
    ) -> None:
        architecture = Architecture.from_config(read_config(checkpoint))
        self.architecture = architecture.with_activations(activations or {})
        if self.architecture.quantized:
            raise ModelError(f"{checkpoint} is compressed already; its weights cannot be changed")
        self.reader = TensorReader(checkpoint)
        self.reader.require(tuple(self.architecture.tensors()))
        self.batches = tuple(batches)
        self.device, self.dtype = torch.device(device), dtype
        self.scratch, self.memory_budget = scratch, memory_budget
        self.lanes = lanes or Lanes()
        self.parks = parks and self.device.type == "cpu"
        self.lots = [ParkingLot(scratch) if self.parks else None for _ in range(self.lanes.count)]
        if self.parks:
            keep_memory()
        self.domains = tuple(sorted({name for batch in batches for name in batch.domains}))
        self._changed: dict[str, Tensor] = {}
        self._skeletons = [
            Skeleton(checkpoint, self.architecture, self.device, dtype)
            for _ in range(self.lanes.count)
        ]
        for other in self._skeletons[1:]:
            other.share(self._skeletons[0])
        self._fill_outside()
        self._inputs = ActivationStore(self.folder(0), 0)

    @property
    def skeleton(self) -> Skeleton:
        """The model in which the calling thread may run a forward."""
        return self._skeletons[self.lanes.here]

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """The blocks in order, each released when the next one is asked for.

        A block that the caller leaves without `forward()` is run as it stands.

        Args:
            start: index of the first block; above 0 its inputs must have been saved.

        Raises:
            ResumeError: `start` is above 0 and its inputs were not saved, or belong to other text.
        """
        self._inputs = self._embedded() if start == 0 else self._saved(start)
        for index in range(start, self.architecture.layers):
            block = Block(self, index, self._inputs)
            yield block
            block.close()
            self._inputs = block.outputs

    def keep(self) -> None:
        """Run all blocks and keep what enters each, and what leaves the last, to walk back.

        A walk that was interrupted finds what it kept.
        """
        try:
            self._inputs = self._saved(self.architecture.layers)
        except ResumeError:
            for block in self.blocks():
                block.inputs.save(self.label)
            self._inputs.save(self.label)

    def outputs(self) -> Iterator[Tensor]:
        """What leaves the last block, per batch [batch, length, hidden]; after all blocks ran."""
        return iter(self._inputs)

    def kept(self, index: int) -> Block:
        """Any one block with its inputs, after `keep`; hand it back with `release`."""
        return Block(self, index, self._saved(index))

    def release(self, block: Block) -> None:
        """Free a block that `kept` gave."""
        block.inputs.free()
        self.skeleton.release(block.module)
        return_memory()

    def predictions(self) -> Iterator[tuple[Tensor, Tensor]]:
        """What enters the head [tokens, width], and its logits [tokens, vocab], piece by piece.

        Valid tokens only; after all blocks ran.
        """
        for hidden, batch in zip(self.final_hidden(), self.batches, strict=True):
            for piece in torch.split(hidden[batch.mask.to(hidden.device)], HEAD_TOKENS):
                yield piece, self.logits(piece)

    def rest(self) -> tuple[str, ...]:
        """Names on disk of all tensors outside the blocks."""
        inside = tuple(self.prefix(index) for index in range(self.architecture.layers))
        return tuple(name for name in self.reader.names if not name.startswith(inside))

    def tensor(self, name: str) -> Tensor:
        """A tensor in its disk shape and dtype: as changed by `set_tensor`, else as on disk."""
        return self._changed[name] if name in self._changed else self._read(name)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Change a tensor outside the blocks (disk shape); later activations feel it.

        Raises:
            ModelError: there is no such tensor outside the blocks, or its shape differs.
        """
        if name not in self.rest():
            raise ModelError(f"there is no tensor {name!r} outside the blocks")
        self._changed[name] = self.as_on_disk(name, value)
        self._fill_outside()
        self.skeleton.release(self.skeleton.head)

    def final_hidden(self) -> Iterator[Tensor]:
        """After the last block: per batch what enters the head, [batch, length, width]."""
        for hidden, batch in zip(self._inputs, self.batches, strict=True):
            with torch.no_grad():
                finished = self.skeleton.finish(hidden, batch.mask)
            yield finished  # outside: who reads two models in turn would end without gradients

    def finish(self, batch: int, hidden: Tensor) -> Tensor:
        """What would enter the head, [batch, length, width], for other outputs of the blocks."""
        with torch.no_grad():
            return self.skeleton.finish(hidden, self.batches[batch].mask)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [..., vocab] as the model computes them, for hidden states [..., width]."""
        self.require_head()
        with torch.no_grad():
            return self.skeleton.logits(hidden)

    def embedded_with(self, batch: int, table: Tensor) -> Tensor:
        """What would enter block 0 with another embedding [vocab, width]; nothing is kept."""
        with self.embedding(table), torch.no_grad():
            return self.skeleton.embed(self.batches[batch].input_ids, self.batches[batch].mask)

    @contextmanager
    def embedding(self, table: Tensor | None = None) -> Iterator[nn.Module]:
        """The module of the embedding, alive within the block.

        Args:
            table: [vocab, width] in place of the model's own.
        """
        module = self.skeleton.embedding
        weight = self.tensor(self._table("embed").tensor) if table is None else table
        module.weight = _parameter(weight, self.device, self.dtype)
        yield module
        self.skeleton.release(module)

    def logits_with(
        self, batch: int, hidden: Tensor, tensors: Mapping[str, Tensor], head: Tensor
    ) -> Tensor:
        """Logits [batch, length, vocab] of other hidden states behind the last block.

        Args:
            batch: whose mask applies.
            hidden: [batch, length, hidden].
            tensors: small tensors outside the blocks to compute with instead of the model's own,
                by name on disk; nothing is kept.
            head: weight of the head [vocab, width].
        """
        for name, value in tensors.items():
            self.skeleton.assign(self.architecture.module_tensor(name), value)
        module = self.skeleton.head
        module.weight = _parameter(head, self.device, self.dtype)
        with torch.no_grad():
            logits = self.skeleton.logits(self.skeleton.finish(hidden, self.batches[batch].mask))
        self.skeleton.release(module)
        self._fill_outside()
        return logits

    def _read(self, name: str) -> Tensor:
        """A tensor as on disk, which must be numbers: nothing can be computed with others."""
        tensor = self.reader.read(name)
        # Extremes show a NaN or an infinity and, unlike a mask, take no memory.
        if not all(extreme.isfinite() for extreme in tensor.aminmax()):
            raise ModelError(
                f"{name} of {self.reader.checkpoint} holds a NaN or an infinity",
                "the model is damaged: download or convert it again",
            )
        return tensor

    def prefix(self, index: int) -> str:
        """How names on disk of a block's tensors begin."""
        return f"{self.architecture.blocks_path}.{index}."

    def require_head(self) -> None:
        """Bring the head to life if it is not; it stays."""
        head = self.skeleton.head
        if next(head.parameters()).is_meta:
            head.weight = _parameter(self.tensor(self._head_tensor), self.device, self.dtype)

    def same_head(self, other: BlockWalk) -> bool:
        """Whether two checkpoints make the same logits of the same hidden states, as on disk."""
        if self.architecture.config != other.architecture.config:
            return False
        names = self._head_names
        return names == other._head_names and all(
            torch.equal(self.tensor(name), other.tensor(name)) for name in names
        )

    @property
    def _head_names(self) -> list[str]:
        """Names on disk of the head's weight and bias."""
        module = self._head_tensor.removesuffix("weight")
        return sorted(name for name in self.rest() if name.startswith(module))

    @property
    def _head_tensor(self) -> str:
        """Name on disk of the head's weight; that of the embedding where they are one."""
        return self._table("embed" if self.architecture.tied else "head").tensor

    def folder(self, index: int) -> Path:
        """Where what enters a block is saved."""
        return self.scratch / f"inputs-{index:05d}"

    def _new_store(self, index: int) -> ActivationStore:
        """Half the budget is for forwards that stand still; inputs and outputs share the rest.

        A walk that parks keeps nothing: its outputs are about to be saved, and read once.
        """
        return ActivationStore(self.folder(index), 0 if self.parks else self.memory_budget // 4)

    @property
    def room_to_stand(self) -> int:
        """Bytes that forwards of a lane may hold in memory while they stand still, all batches.

        To park them costs a copy to and from memory of the operating system, a few percent of
        the walk's time, and makes its peak independent of how much text there is.
        """
        half = self.memory_budget // 2
        return (min(half, ROOM_BESIDE_PARKED) if self.parks else half) // self.lanes.count

    def bytes_standing(self, index: int) -> int:
        """What a forward in front of a matrix holds of one token, at most."""
        return held_by_forward(self.architecture, index) * self.dtype.itemsize

    def _table(self, role: str) -> Matrix:
        return next(matrix for matrix in self.architecture.matrices if matrix.role == role)

    def _fill_outside(self) -> None:
        """Norms, positions and projections are small and stay; embedding and head do not."""
        large = {matrix.tensor for matrix in self.architecture.matrices if matrix.role in _LARGE}
        for name, _ in self.architecture.tensors():
            if name not in large and not name.startswith(f"{self.architecture.blocks_path}."):
                module_name = self.architecture.module_tensor(name)
                self.skeleton.assign(module_name, self.tensor(name))

    def _embedded(self) -> ActivationStore:
        store = self._new_store(0)
        self._require_rows(self._table("embed").shape[0])
        with self.embedding(), torch.no_grad():
            for batch in self.batches:
                store.append(self.skeleton.embed(batch.input_ids, batch.mask))
        return_memory()
        return store

    def _require_rows(self, rows: int) -> None:
        """Every token must have its row in the embedding."""
        largest = max((int(batch.input_ids.max()) for batch in self.batches), default=0)
        if largest >= rows:
            raise ModelError(
                f"the tokenizer gives token {largest}, but the embedding of "
                f"{self.reader.checkpoint} has {rows} rows",
                "take the tokenizer that belongs to the model",
            )

    def _saved(self, index: int) -> ActivationStore:
        return ActivationStore.load(self.folder(index), self.memory_budget // 4, self.label)

    @cached_property
    def label(self) -> str:
        """Fingerprint of the text, its batches and the precision that activations belong to."""
        digest = hashlib.sha256(str(self.dtype).encode())
        for batch in self.batches:
            digest.update(str(tuple(batch.mask.shape)).encode())
            digest.update(batch.input_ids.to(torch.int64).cpu().numpy().tobytes())
            digest.update(batch.mask.cpu().numpy().tobytes())
        return digest.hexdigest()

    def as_on_disk(self, name: str, value: Tensor) -> Tensor:
        """A copy on the CPU in the disk dtype.

        Raises:
            ModelError: the shape is not that on disk.
        """
        if tuple(value.shape) != self.reader.shape(name):
            raise ModelError(
                f"{name} has shape {list(self.reader.shape(name))},"
                f" so {list(value.shape)} cannot replace it"
            )
        return value.detach().to("cpu", self.reader.dtype(name), copy=True).contiguous()

    def valid(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Mask [tokens] of what is no padding, and the domain index of every token [tokens]."""
        rows = torch.tensor([self.domains.index(name) for name in batch.domains])
        domains = rows.repeat_interleave(batch.mask.shape[1])
        return batch.mask.flatten().to(self.device), domains.to(self.device)


_LARGE = ("embed", "head")


def _parameter(value: Tensor, device: torch.device, dtype: torch.dtype) -> nn.Parameter:
    return nn.Parameter(value.to(device, dtype), requires_grad=False)
