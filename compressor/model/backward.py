"""Gradients that flow back through a walk which kept what enters its blocks, one at a time.

walk.keep()                                    # forward, once
gradients = Gradients(walk)
gradients.save(layers, [gradients.sampled(…) for …])
for index in reversed(range(layers)):
    block = walk.kept(index)
    gradients.pass_through(block, observe)
    walk.release(block)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.model.activations import ActivationStore
from compressor.model.block import Block
from compressor.model.experts import ExpertWatch
from compressor.model.lookups import LookUps
from compressor.model.matrices import Matrix
from compressor.model.walk import HEAD_TOKENS, BlockWalk

GradientObserver = Callable[[str, Tensor, Tensor], None]
"""Called with (name of a matrix, inputs [tokens, in], gradients of its outputs [tokens, out])."""


class Gradients:
    """Those of what enters each block and leaves the last, on disk beside the activations.

    Args:
        walk: whose text and blocks they belong to.
    """

    def __init__(self, walk: BlockWalk) -> None:
        self._walk = walk

    def at(self, index: int) -> ActivationStore:
        """Gradients of what leaves block `index` - 1, as `save` left them.

        Raises:
            ResumeError: none were saved.
        """
        walk = self._walk
        return ActivationStore.load(self._folder(index), walk.memory_budget // 2, walk.label)

    def save(self, index: int, gradients: Iterable[Tensor]) -> None:
        """Put the gradients of what enters block `index` on disk, one tensor per batch."""
        store = ActivationStore(self._folder(index), self._walk.memory_budget // 2)
        for gradient in gradients:
            store.append(gradient)
        store.save(self._walk.label)

    def drop(self, index: int) -> None:
        """Forget what `at` has, for which nothing asks once the block below is passed through."""
        ActivationStore(self._folder(index), 0).delete()

    def sampled(
        self,
        batch: int,
        hidden: Tensor,
        generator: torch.Generator,
        observe: GradientObserver | None = None,
    ) -> Tensor:
        """Gradient of Σ log p(y) over valid tokens, y drawn from the model's own predictions.

        Args:
            batch: whose mask applies.
            hidden: what leaves the last block, [batch, length, hidden].
            generator: draws y.
            observe: called with "head", what enters it and the gradients of its logits.

        Returns:
            The gradient with respect to `hidden`, of its shape.
        """
        walk = self._walk
        walk.require_head()
        mask = walk.batches[batch].mask.to(walk.device)
        hidden = hidden.to(walk.device, walk.dtype).detach().requires_grad_()
        with torch.enable_grad():
            final = walk.skeleton.finish(hidden, walk.batches[batch].mask)
        pieces = torch.split(final.detach()[mask], HEAD_TOKENS)
        upstream = torch.zeros_like(final)
        upstream[mask] = torch.cat([self._of_head(piece, generator, observe) for piece in pieces])
        (gradient,) = torch.autograd.grad(final, hidden, upstream)
        return gradient

    def _of_head(
        self, inputs: Tensor, generator: torch.Generator, observe: GradientObserver | None
    ) -> Tensor:
        """The same with respect to what enters the head, [tokens, width]."""
        inputs = inputs.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._walk.skeleton.logits(inputs)
            chances = torch.log_softmax(logits.float(), -1)
            drawn = torch.multinomial(chances.detach().exp().cpu(), 1, generator=generator)
            likelihood = chances.gather(-1, drawn.to(self._walk.device)).sum()
        gradient, of_logits = torch.autograd.grad(likelihood, [inputs, logits])
        if observe:
            observe("head", inputs.detach(), of_logits)
        return gradient

    def pass_through(self, block: Block, observe: GradientObserver) -> None:
        """Put on disk what enters a block, given what `at` has of what leaves it.

        Args:
            block: as `BlockWalk.kept` gives it.
            observe: called for every matrix but routers, with valid tokens only; for those of an
                expert with the tokens routed to it, if there are any.

        Raises:
            ResumeError: there are no gradients of what leaves it.
        """
        above = self.at(block.index + 1)
        self.save(
            block.index,
            (self._entering(block, batch, above[batch], observe) for batch in range(len(above))),
        )

    def _entering(
        self, block: Block, batch: int, gradient: Tensor, observe: GradientObserver
    ) -> Tensor:
        """Gradient [batch, length, hidden] of what enters a block, given that of what leaves it."""
        walk = self._walk
        text = walk.batches[batch]
        hidden = block.inputs[batch].to(walk.device, walk.dtype).detach().requires_grad_()
        with _Products(block, walk.valid(text)[0]) as seen, torch.enable_grad():
            output = walk.skeleton.block(block.index, hidden, text.mask)
        outputs = [product.output for product in seen]
        entered, *found = torch.autograd.grad(output, [hidden, *outputs], gradient.to(output))
        for product, gradients in zip(seen, found, strict=True):
            flat = gradients.reshape(-1, gradients.shape[-1])[product.keep]
            for name, rows in product.matrices:
                observe(name, product.inputs[product.keep], flat[:, rows])
        return entered

    def of_lookups(self, batch: int, gradient: Tensor) -> Tensor:
        """Gradients of the rows that valid tokens look up in the embedding, [tokens, width].

        Args:
            batch: its index.
            gradient: of what enters block 0, [batch, length, hidden].
        """
        walk, text = self._walk, self._walk.batches[batch]
        with walk.embedding() as embedding, torch.enable_grad(), LookUps(embedding) as looked_up:
            hidden = walk.skeleton.embed(text.input_ids, text.mask)
        (found,) = torch.autograd.grad(hidden, looked_up.rows, gradient.to(hidden))
        rows: Tensor = found[text.mask.to(found.device)]
        return rows

    def _folder(self, index: int) -> Path:
        return self._walk.scratch / f"gradients-{index:05d}"


@dataclass(frozen=True)
class _Product:
    """One matrix product of a forward pass, which may hold several matrices.

    Attributes:
        matrices: names, and which of the outputs are theirs.
        inputs: [tokens, in].
        output: [..., out], part of the graph.
        keep: which tokens are no padding [tokens].
    """

    matrices: tuple[tuple[str, slice], ...]
    inputs: Tensor
    output: Tensor
    keep: Tensor


class _Products:
    """Within it, the products of a block's matrices are noted down, but those of routers.

    Args:
        block: whose.
        valid: which tokens are no padding [tokens].
    """

    def __init__(self, block: Block, valid: Tensor) -> None:
        self._block, self._valid = block, valid
        self._seen: list[_Product] = []
        self._stack = ExitStack()

    def __enter__(self) -> list[_Product]:
        infos = [matrix.info for matrix in self._block.matrices]
        routed = [info for info in infos if info.expert is not None]
        for info in infos:
            if info.expert is None and info.role != "router":
                self._stack.callback(self._watch(info).remove)
        if routed:
            self._stack.enter_context(self._watch_experts(routed))
        return self._seen

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _watch(self, matrix: Matrix) -> RemovableHandle:
        def keep(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            inputs = args[0].detach().reshape(-1, args[0].shape[-1])
            whole = ((matrix.name, slice(None)),)
            self._seen.append(_Product(whole, inputs, output, self._valid))

        return self._block.module_of(matrix).register_forward_hook(keep)

    def _watch_experts(self, routed: Sequence[Matrix]) -> ExpertWatch:
        """The same for routed experts, whose gate and up are one product."""
        names: dict[tuple[int | None, str], list[tuple[str, slice]]] = {}
        for matrix in routed:
            side = "out" if matrix.role == "down" else "in"
            rows = self._block.rows_of(matrix)
            names.setdefault((matrix.expert, side), []).append((matrix.name, rows))

        def keep(expert: int, side: str, rows: Tensor, tokens: Tensor, output: Tensor) -> None:
            chosen = self._valid[tokens]
            if bool(chosen.any()):
                matrices = tuple(names[expert, side])
                self._seen.append(_Product(matrices, rows.detach(), output, chosen))

        return ExpertWatch(self._block.experts, keep)
