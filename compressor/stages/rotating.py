"""Fold rotations into a checkpoint, block by block.

With x the residual stream (a row), every norm an RMSNorm, R and R₂ orthogonal:

    norm(x) diag(γ) Wᵀ  =  norm(xR) (W diag(γ) R)ᵀ      readers: W ← W diag(γ) R, γ ← 1
    x + y Wᵀ + b        →  xR + y (RᵀW)ᵀ + bR           writers: W ← RᵀW, b ← bR
    A v Wₒᵀ             =  A (v R₂) (Wₒ R₂)ᵀ            values: W ← R₂ᵀW, b ← bR₂, head by head

The mean square that an RMSNorm divides by does not change under R. Embeddings are not centred:
an RMSNorm subtracts no mean, so that centring would change the function. Attention mixes whole
tokens, hence one R₂ for all heads of a block is right for grouped queries too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from compressor.calibration import CalibrationSet, build_development
from compressor.formats.shards import CheckpointReader, CheckpointWriter, shard_name
from compressor.model.architecture import Architecture
from compressor.model.files import read_config
from compressor.model.load import load_model, load_tokenizer
from compressor.model.matrices import Matrix
from compressor.numerics.hadamard import Rotation, Turned, random_rotation
from compressor.progress import SilentObserver
from compressor.stages.context import StageContext
from compressor.stages.equivalence import logit_difference
from compressor.stages.rotation_learning import Learned, Turns, learn, load_turns, save_turns
from compressor.types import BlockRecord, Fallback, StageResult, TokenBatch

if TYPE_CHECKING:
    from compressor.stages.transform_rotate import TransformRotate

AnyRotation = Rotation | Turned
"""Seeded, and perhaps learned further."""

_ROWS = 1 << 14  # of embedding and head that are in fp64 at a time
_WRITERS = ("o", "down")
_WINDOWS = 2  # of each domain; every check runs them
_NOT_LEARNED = Fallback(
    "all rotations",
    "learning never lowered the divergence on held-out text",
    "they stay as the seed has them",
)


def rotate_model(
    stage: TransformRotate,
    checkpoint: Path,
    calibration: CalibrationSet | None,
    context: StageContext,
) -> StageResult:
    """Write the rotated checkpoint and compare its function with the parent's.

    A block depends on nothing but the parent and the rotations, which depend on the seed and, if
    learned, are kept; so an interrupted stage goes on at the next one.

    Raises:
        VerificationError: the fp32 logits moved, or the disk holds something else than what was
            compared.
    """
    architecture = Architecture.from_config(read_config(checkpoint))
    reader = CheckpointReader(checkpoint)
    fold = Fold(architecture, reader, *rotations(stage, architecture), context.device)
    notes: dict[str, float] = {}
    fallbacks: tuple[Fallback, ...] = ()
    if stage.learn:
        assert calibration is not None  # calibration_need() says so; the recipe was checked
        learned = _learned(stage, fold, checkpoint, calibration, context)
        fold = fold.turned(learned.turns)
        notes = {"held-out KL rounded, seed": learned.before, "held-out KL rounded": learned.after}
        fallbacks = () if learned.after < learned.before else (_NOT_LEARNED,)
    _write(fold, checkpoint, context.folder, context)
    difference = logit_difference(checkpoint, context.folder, fold.exact, context)
    return StageResult(
        checkpoint=context.folder,
        changed=tuple(name for name in reader if fold.moves(name)),
        added=fold.added,
        fallbacks=fallbacks,
        notes=notes | {"largest logit difference in fp32, before storage": difference},
    )


def _write(fold: Fold, checkpoint: Path, folder: Path, context: StageContext | None) -> None:
    """The rotated checkpoint; with a context, blocks are reported and those reported are there."""
    before, reader, writer = fold.before, CheckpointReader(checkpoint), CheckpointWriter(folder)
    done = len(context.finished) if context else 0
    observer = context.observer if context else SilentObserver()
    with observer.task("rotating blocks", before.layers) as task:
        task.advance(done)
        for index in range(done, before.layers):
            writer.write_shard(shard_name(index), fold.stored(_block_names(reader, index, fold)))
            if context:
                context.block_done(BlockRecord(index))
            task.advance()
    outside = [name for name in reader if not name.startswith(f"{before.blocks_path}.")]
    writer.write_shard(shard_name("outside"), fold.stored(dict.fromkeys([*outside, *fold.added])))
    config = read_config(checkpoint)
    if fold.unties:
        config = {**config, "tie_word_embeddings": False}
    writer.finish(config, checkpoint, fold.after.parameters)


def _learned(
    stage: TransformRotate,
    fold: Fold,
    checkpoint: Path,
    calibration: CalibrationSet,
    context: StageContext,
) -> Learned:
    """What was learned behind the seeded rotations, now or by an attempt that was interrupted."""
    kept = context.scratch / "turns.safetensors"
    if not kept.is_file():
        seeded = context.scratch / "seeded"
        _write(fold, checkpoint, seeded, None)
        model = load_model(seeded, context.device, torch.float32)
        held = held_out(checkpoint, fold.before.max_positions)
        with context.observer.task("learning rotations", stage.learn) as task:
            learned = learn(stage, model, fold.after, calibration.batches, held, task.advance)
        shutil.rmtree(seeded)
        save_turns(learned, kept)
    return load_turns(kept)


def held_out(checkpoint: Path, longest: int) -> list[TokenBatch]:
    """Some windows of every domain's development text, which states are compared on."""
    return [
        TokenBatch(batch.input_ids[:_WINDOWS], batch.mask[:_WINDOWS], batch.domains[:_WINDOWS])
        for batch in build_development(load_tokenizer(checkpoint), longest=longest)
    ]


def rotations(
    stage: TransformRotate, architecture: Architecture
) -> tuple[Rotation | None, tuple[Rotation, ...]]:
    """R, or None, and the R₂ of every block, or none; R₂ of block i is drawn from seed + 1 + i."""
    residual = None
    if stage.residual:
        residual = random_rotation(architecture.hidden, stage.seed, stage.kind)
    heads = tuple(
        random_rotation(architecture.head_dim, stage.seed + 1 + index, stage.kind)
        for index in range(architecture.layers if stage.heads else 0)
    )
    return residual, heads


def _block_names(reader: CheckpointReader, index: int, fold: Fold) -> list[str]:
    prefix = f"{fold.before.blocks_path}.{index}."
    return [name for name in reader if name.startswith(prefix)]


class Fold:
    """What rotations make of every tensor of a checkpoint.

    Args:
        before: architecture of the parent.
        reader: the parent's tensors.
        residual: R [hidden, hidden]; None leaves the residual stream alone.
        heads: R₂ [head_dim, head_dim] of every block; empty leaves the values alone.
        device: where products are computed.
    """

    def __init__(
        self,
        before: Architecture,
        reader: Mapping[str, Tensor],
        residual: AnyRotation | None,
        heads: tuple[AnyRotation, ...],
        device: torch.device,
    ) -> None:
        self.before, self.reader, self.device = before, reader, device
        self.residual, self.heads = residual, heads
        self.unties = residual is not None and before.tied
        self.after = before.with_config(tie_word_embeddings=False) if self.unties else before

    @property
    def added(self) -> tuple[str, ...]:
        """Names of tensors that the parent does not have."""
        return (self._head,) if self.unties and self._head not in self.reader else ()

    def turned(self, turns: Turns) -> Fold:
        """The same with rotations turned further."""
        residual, heads = self.residual, self.heads
        if residual is not None and turns.residual is not None:
            residual = Turned(residual, turns.residual)
        if turns.heads is not None:
            pairs = zip(heads, turns.heads, strict=True)
            heads = tuple(Turned(head, turn[None]) for head, turn in pairs)
        return Fold(self.before, self.reader, residual, heads, self.device)

    def stored(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors of the new checkpoint: folded in fp64, rounded once to the parent's dtype."""
        return {name: self._folded(name, None) for name in names}

    def exact(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Those of the tensors, and of `added`, that the fold touches, in fp32."""
        return {name: self._folded(name, torch.float32) for name in names if self._touches(name)}

    def moves(self, name: str) -> bool:
        """Whether the fold changes a tensor: it touches it, and it is no fixed point."""
        if not self._touches(name):
            return False
        still = self.reader[name]
        return not bool((still == 1).all()) if name in self._norms else bool(still.any())

    @cached_property
    def _matrices(self) -> Mapping[str, Matrix]:
        return {matrix.name: matrix for matrix in self.after.matrices}

    @cached_property
    def _gammas(self) -> Mapping[str, str]:
        """The norm whose scale a matrix takes in, by the matrix's name."""
        return {
            matrix.name: norm
            for index in range(self.before.layers if self.residual else 0)
            for norm, matrices in self.before.norm_readers(index).items()
            for matrix in matrices
        }

    @cached_property
    def _norms(self) -> frozenset[str]:
        return frozenset([*self._gammas.values(), self.before.final_norm] if self.residual else ())

    @property
    def _head(self) -> str:
        return self.after.matrices[-1].tensor

    def _touches(self, name: str) -> bool:
        if name in self._norms:
            return True
        module, _, kind = name.rpartition(".")
        matrix = self._matrices.get(module)
        if matrix is None:
            return False
        if self.residual and (matrix.role in _WRITERS or matrix.block is None):
            return True
        reads = module in self._gammas or (bool(self.heads) and matrix.role == "o")
        values = bool(self.heads) and self.before.value_rows(matrix) is not None
        return values or (reads and kind == "weight")

    def _folded(self, name: str, dtype: torch.dtype | None) -> Tensor:
        """One tensor of the new checkpoint, rounded to `dtype` (None: as the parent has it)."""
        module, _, kind = name.rpartition(".")
        # Only a head that the fold unties is not in the parent's files, where it is the embedding.
        tensor = self.reader[name if name in self.reader else self.before.matrices[0].tensor]
        if name in self._norms:
            folded = torch.ones_like(tensor)
        elif not self._touches(name):
            folded = tensor
        elif self._matrices[module].block is None:
            return self._table(name, tensor, dtype or tensor.dtype)
        else:
            fold = self._bias if kind == "bias" else self._weight
            folded = fold(self._matrices[module], tensor.to(self.device, torch.float64))
        return folded.to("cpu", dtype or tensor.dtype).contiguous()

    def _weight(self, matrix: Matrix, stored: Tensor) -> Tensor:
        """A matrix of a block as on disk, fp64."""
        weight = stored.T if matrix.transposed_on_disk else stored
        if self.residual and matrix.name in self._gammas:
            gamma = self.reader[self._gammas[matrix.name]].to(weight)
            weight = self.residual.right(weight * gamma)
        if self.residual and matrix.role in _WRITERS:
            weight = self.residual.left(weight)
        if self.heads and matrix.block is not None:
            weight = self._on_heads(matrix, weight, self.heads[matrix.block])
        return weight.T if matrix.transposed_on_disk else weight

    def _on_heads(self, matrix: Matrix, weight: Tensor, rotation: AnyRotation) -> Tensor:
        """R₂ on the inputs [heads·head_dim] of o, or on the outputs [kv_heads·head_dim] of v."""
        if matrix.role == "o":
            return rotation.right(weight.view(len(weight), -1, rotation.size)).flatten(1)
        rows = self.before.value_rows(matrix)
        if rows is None:
            return weight
        values = rotation.left(weight[rows].view(-1, rotation.size, weight.shape[1]))
        return torch.cat([weight[: rows.start], values.flatten(0, 1)])

    def _bias(self, matrix: Matrix, bias: Tensor) -> Tensor:
        """A bias of a block, fp64: what a writer adds to the stream, or part of the values."""
        if matrix.role in _WRITERS:
            return self.residual.right(bias) if self.residual else bias
        assert matrix.block is not None
        column = self._on_heads(matrix, bias[:, None], self.heads[matrix.block])
        return column[:, 0]

    def _table(self, name: str, table: Tensor, dtype: torch.dtype) -> Tensor:
        """Embedding or head [vocab, hidden], some rows at a time."""
        assert self.residual is not None
        scale = torch.ones((), dtype=torch.float64, device=self.device)
        if name == self._head:
            scale = self.reader[self.before.final_norm].to(scale)
        folded = torch.empty_like(table, dtype=dtype)
        for start in range(0, len(table), _ROWS):
            rows = table[start : start + _ROWS].to(self.device, torch.float64)
            folded[start : start + _ROWS] = self.residual.right(rows * scale).cpu()
        return folded
