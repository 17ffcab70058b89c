"""Learn rotations on calibration text: turn them until the rounded model predicts like the model.

    L(C, C₂) = KL(p ‖ p of the model with every matrix W replaced by rotate⁻¹(Q(rotate(W))))

C turns the residual stream behind the seeded R (block-diagonal where it is wide), C₂ the values of
a block behind its R₂; both begin at the identity and take steps on the manifold. Embedding and head
are not rounded, so that the stream itself can stay as it is and only weights turn back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor
from torch.utils.checkpoint import checkpoint as recomputed

from compressor.formats.atomic import atomic_write_bytes
from compressor.model.architecture import Architecture
from compressor.model.matrices import Matrix
from compressor.numerics.cayley import by_blocks, descent, through_grid, turned
from compressor.numerics.distillation import forward_kl
from compressor.types import TokenBatch

if TYPE_CHECKING:
    from compressor.stages.transform_rotate import TransformRotate

_WRITERS = ("o", "down")
_CHECKS = 4  # of the state on held-out text, evenly over the steps; the last one is among them


@dataclass(frozen=True)
class Turns:
    """What is learned, fp64.

    Attributes:
        residual: C as its diagonal blocks [k, b, b]; None leaves the stream alone.
        heads: C₂ of every block [layers, head_dim, head_dim]; None leaves the values alone.
    """

    residual: Tensor | None
    heads: Tensor | None

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Those there are."""
        return tuple(part for part in (self.residual, self.heads) if part is not None)

    def with_parts(self, parts: Sequence[Tensor]) -> Turns:
        """The same with other values."""
        left = iter(parts)
        residual = None if self.residual is None else next(left)
        return Turns(residual, None if self.heads is None else next(left))


@dataclass(frozen=True)
class Learned:
    """The best turns, and the divergence on held-out text before and with them."""

    turns: Turns
    before: float
    after: float


def save_turns(learned: Learned, path: Path) -> None:
    """Keep what was learned; the file is whole or not there."""
    found = {"residual": learned.turns.residual, "heads": learned.turns.heads}
    tensors = {name: value for name, value in found.items() if value is not None}
    tensors["distances"] = torch.tensor([learned.before, learned.after], dtype=torch.float64)
    atomic_write_bytes(path, save(tensors))


def load_turns(path: Path) -> Learned:
    """What `save_turns` kept."""
    tensors = load_file(path)
    before, after = tensors.pop("distances").tolist()
    return Learned(Turns(tensors.get("residual"), tensors.get("heads")), before, after)


def start(stage: TransformRotate, architecture: Architecture) -> Turns:
    """Identities of the sizes that are learned."""
    residual = heads = None
    if stage.residual:
        size = stage.learned_block(architecture.hidden)
        residual = _identities(architecture.hidden // size, size)
    if stage.heads:
        heads = _identities(architecture.layers, architecture.head_dim)
    return Turns(residual, heads)


def _identities(count: int, size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64).repeat(count, 1, 1)


def learn(
    stage: TransformRotate,
    model: Any,
    architecture: Architecture,
    batches: Sequence[TokenBatch],
    held_out: Sequence[TokenBatch],
    advance: Callable[[], None],
) -> Learned:
    """Take `stage.learn` steps and give back the state that diverges least on held-out text.

    Args:
        stage: steps, angle, grid.
        model: the model in the seeded rotation, norms folded, fp32; left as it is.
        architecture: its own.
        batches: calibration text, a batch a step, in the order of the seed.
        held_out: text that chooses the state.
        advance: called after every step.
    """
    bench = _Bench(stage, model, architecture)
    turns = start(stage, architecture)
    before = best = bench.distance(turns, held_out)
    state = turns
    order = torch.Generator().manual_seed(stage.seed)
    checks = {-(-stage.learn * (i + 1) // _CHECKS) for i in range(_CHECKS)}
    for step in range(stage.learn):
        place = int(torch.randint(len(batches), (1,), generator=order))
        angle = stage.angle * (1 - step / stage.learn)
        turns = bench.step(turns, batches[place], angle)
        if step + 1 in checks and (found := bench.distance(turns, held_out)) < best:
            best, state = found, turns
        advance()
    return Learned(state, before, best)


class _Bench:
    """A model whose matrices can be rounded in turned coordinates."""

    def __init__(self, stage: TransformRotate, model: Any, architecture: Architecture) -> None:
        self._scheme, self._model, self._architecture = stage.scheme, model, architecture
        self._device = next(model.parameters()).device

    def step(self, turns: Turns, batch: TokenBatch, angle: float) -> Turns:
        """One turn down the gradient of one batch."""
        free = self._there(turns)
        free = free.with_parts([part.requires_grad_() for part in free.parts])
        gradients = torch.autograd.grad(self._loss(free, batch), free.parts)
        return turns.with_parts(
            [
                turned(part, descent(part, gradient.to(part)), angle)
                for part, gradient in zip(turns.parts, gradients, strict=True)
            ]
        )

    def distance(self, turns: Turns, batches: Sequence[TokenBatch]) -> float:
        """Mean KL of the rounded model over all batches, nats per token."""
        total, tokens = 0.0, 0
        single = self._there(turns)
        with torch.no_grad():
            for batch in batches:
                count = int(batch.mask.sum())
                total += float(self._loss(single, batch)) * count
                tokens += count
        return total / tokens

    def _there(self, turns: Turns) -> Turns:
        """Turns, which are small and kept in fp64 on the processor, as the model reads them."""
        return turns.with_parts([part.to(self._device, torch.float32) for part in turns.parts])

    def _loss(self, turns: Turns, batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            teacher = self._model(**self._inputs(batch)).logits[batch.mask].softmax(-1)
        weights = dict(self._rounded(turns))
        output = torch.func.functional_call(self._model, weights, (), self._inputs(batch))
        return forward_kl(output.logits[batch.mask], teacher).mean()

    def _inputs(self, batch: TokenBatch) -> dict[str, Any]:
        ids, mask = batch.input_ids.to(self._device), batch.mask.to(self._device)
        return {"input_ids": ids, "attention_mask": mask.long(), "use_cache": False}

    def _rounded(self, turns: Turns) -> Iterator[tuple[str, Tensor]]:
        """Every matrix of a block, rounded in turned coordinates and turned back."""
        for matrix in self._architecture.matrices:
            if matrix.block is None or matrix.role == "router":
                continue
            name = self._architecture.module_tensor(matrix.tensor)
            head = None if turns.heads is None else turns.heads[matrix.block]
            there_and_back = partial(self._there_and_back, matrix)
            # Keeps the result only; what leads to it is computed again on the way back.
            weight = self._model.get_parameter(name)
            yield (
                name,
                recomputed(there_and_back, weight, turns.residual, head, use_reentrant=False),
            )

    def _there_and_back(
        self, matrix: Matrix, weight: Tensor, residual: Tensor | None, head: Tensor | None
    ) -> Tensor:
        there = self._turn(matrix, weight, residual, head)
        back = (None if turn is None else turn.mT for turn in (residual, head))
        return self._turn(matrix, through_grid(there, self._scheme), *back)

    def _turn(
        self, matrix: Matrix, weight: Tensor, residual: Tensor | None, head: Tensor | None
    ) -> Tensor:
        """The matrix [out, in] in coordinates that are turned further."""
        if residual is not None and matrix.role in _WRITERS:
            weight = by_blocks(weight.mT, residual).mT
        elif residual is not None:
            weight = by_blocks(weight, residual)
        if head is None:
            return weight
        if matrix.role == "o":
            return (weight.reshape(-1, len(head)) @ head).reshape(weight.shape)
        rows = self._architecture.value_rows(matrix)
        if rows is None:
            return weight
        values = head.mT @ weight[rows].reshape(-1, len(head), weight.shape[1])
        return torch.cat([weight[: rows.start], values.flatten(0, 1)])
