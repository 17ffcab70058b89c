"""One decoder block of a walk: its matrices, its inputs, and the forwards through it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.errors import ModelError
from compressor.model.activations import ActivationStore
from compressor.model.experts import ExpertWatch, Place, fused, place
from compressor.model.lanes import Lanes
from compressor.model.matrices import Matrix
from compressor.model.memory import return_memory
from compressor.model.passage import Passage, introduced
from compressor.model.standing import Standing

if TYPE_CHECKING:
    from compressor.model.walk import BlockWalk

Observer = Callable[[str, Tensor, Tensor], None]
"""Called with (input group, inputs [tokens, in], index of each token's domain [tokens])."""


ExpertObserver = Callable[[int, Tensor, Tensor], None]
"""Called with (expert, outputs [tokens, hidden] before the router's weights, those [tokens])."""


class BlockMatrix:
    """One matrix of the block that is in memory.

    Attributes:
        info: name, shape, role, input group.
    """

    def __init__(self, block: Block, info: Matrix) -> None:
        self._block = block
        self.info = info

    @property
    def weight(self) -> Tensor:
        """A copy of the weight [out, in] in the walk's dtype, on the walk's device."""
        return self._block._view(self.info).clone()

    def set_weight(self, weight: Tensor) -> None:
        """Replace the weight by one [out, in], rounded to the disk dtype.

        Raises:
            ModelError: the shape differs.
        """
        if tuple(weight.shape) != self.info.shape:
            raise ModelError(
                f"{self.info.name} is {list(self.info.shape)} (out, in),"
                f" so {list(weight.shape)} cannot replace it"
            )
        value = weight.T if self.info.transposed_on_disk else weight
        self._block.set_tensor(self.info.tensor, value)


class Block:
    """One block in memory, with what enters it.

    Attributes:
        index: its position.
        matrices: its matrices in execution order.
        inputs: hidden states that enter it, one tensor [batch, length, hidden] per batch.
        names: names on disk of all its tensors, also of those that the model does not use.
        domains: names that the domain index of a token refers to.
    """

    def __init__(self, walk: BlockWalk, index: int, inputs: ActivationStore) -> None:
        self._walk = walk
        self.index = index
        self.inputs = inputs
        self.names = walk.reader.under(walk.prefix(index))
        self.domains = walk.domains
        self._groups = walk.architecture.groups(index)
        self.matrices = tuple(
            BlockMatrix(self, matrix) for matrix in walk.architecture.block(index)
        )
        self._places = {
            matrix.info.tensor: place(walk.architecture, matrix.info) for matrix in self.matrices
        }
        self._changed: dict[str, Tensor] = {}
        self._bytes_standing = walk.bytes_standing(index)
        self._standing = [
            Standing(self._held_standing, walk.room_to_stand, lot, self._owned) for lot in walk.lots
        ]
        self._outputs = walk._new_store(index + 1)
        self._fill()

    @property
    def module(self) -> nn.Module:
        """Its live module in the walk's dtype; for optimisation through it."""
        return self._walk.skeleton.layers[self.index]

    @property
    def lanes(self) -> Lanes:
        """In which batches run that are run at the same time."""
        return self._walk.lanes

    def matrix(self, name: str) -> BlockMatrix:
        """The matrix of that name (without `.weight`).

        Raises:
            ModelError: the block has none.
        """
        info = self._walk.architecture.matrix(name)
        for matrix in self.matrices:
            if matrix.info is info:
                return matrix
        raise ModelError(f"{name} belongs to another block than {self.index}")

    def tensor(self, name: str) -> Tensor:
        """Any tensor of the block in its disk shape and dtype, changed or not.

        Raises:
            ModelError: the block has none of that name.
        """
        if name not in self.names:
            raise ModelError(f"block {self.index} has no tensor {name!r}")
        return self._changed[name] if name in self._changed else self._walk.reader.read(name)

    def dtype(self, name: str) -> torch.dtype:
        """That a tensor of the block has on disk."""
        return self._walk.reader.dtype(name)

    def set_tensor(self, name: str, value: Tensor) -> None:
        """Replace any tensor of the block by one of the disk's shape, rounded to its dtype.

        Raises:
            ModelError: the block has none of that name, or the shape differs.
        """
        if name not in self.names:
            raise ModelError(f"block {self.index} has no tensor {name!r}")
        self._changed[name] = self._walk.as_on_disk(name, value)
        self._put(name, self._changed[name].clone())
        self._settle(name)

    def state(self) -> dict[str, Tensor]:
        """All tensors of the block as on disk; those never set are byte-identical to it."""
        return {name: self.tensor(name) for name in self.names}

    def module_of(self, matrix: Matrix) -> nn.Module:
        """The live module that multiplies a matrix; that of all experts for one of theirs."""
        path, _, _ = self._places[matrix.tensor].parameter.rpartition(".")
        module: nn.Module = self._walk.skeleton.model.get_submodule(path)
        return module

    @property
    def experts(self) -> nn.Module:
        """The live module of all routed experts, in a block that has any."""
        return self.module_of(next(m.info for m in self.matrices if m.info.expert is not None))

    def rows_of(self, matrix: Matrix) -> slice:
        """Which outputs of its module's product are a matrix's own."""
        return self._places[matrix.tensor].rows or slice(None)

    def run(self, batch: int) -> Tensor:
        """Output [batch, length, hidden] for one batch with the present weights."""
        mask = self._walk.batches[batch].mask
        return self._walk.skeleton.block(self.index, self.inputs[batch], mask)

    def run_with(self, batch: int, hidden: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        """Output [batch, length, hidden] for other inputs and other tensors of the disk's shapes.

        They are computed with in the walk's dtype, not rounded to the disk's, and not kept.
        """
        for name, value in tensors.items():
            self._put(name, value)
        with torch.no_grad():
            output = self._walk.skeleton.block(self.index, hidden, self._walk.batches[batch].mask)
        for name in tensors:
            self._put(name, self.tensor(name))
        return output

    def run_through(self, batch: int, weights: Mapping[str, Tensor]) -> Tensor:
        """Output for one batch with other matrices, through which gradients flow back to them.

        Args:
            batch: index of the batch.
            weights: [out, in] in any dtype by name, without `.weight`.
        """
        parts: dict[str, list[tuple[Place, Tensor]]] = {}
        for name, weight in weights.items():
            spot = self._places[self.matrix(name).info.tensor]
            parts.setdefault(spot.parameter, []).append((spot, weight.to(self._walk.dtype)))
        with ExitStack() as stack:
            for parameter, found in parts.items():
                path, _, leaf = parameter.rpartition(".")
                module = self._walk.skeleton.model.get_submodule(path)
                # An attribute of the instance goes before the parameter of that name.
                module.__dict__[leaf] = fused(self._walk.skeleton.parameter(parameter), found)
                stack.callback(module.__dict__.pop, leaf)
            return self.run(batch)

    def forward(self) -> None:
        """Run all batches with the present weights; the outputs enter the next block."""
        self._outputs.delete()
        for _ in self.lanes.each(self._end, range(len(self._walk.batches))):
            pass  # the outputs are where they belong

    def _end(self, batch: int) -> None:
        """Run a batch to the end, from where it stands."""
        with torch.no_grad():
            passage = self._standing[self.lanes.here].take(batch)
            output = passage.advance() if passage else None
            self._outputs.put(batch, self.run(batch) if output is None else output)

    def forward_watching(self, observe: ExpertObserver) -> None:
        """`forward` of a block with experts, all of whose answers are reported."""
        self._outputs.delete()
        for batch in range(len(self._walk.batches)):
            valid, _ = self._walk.valid(self._walk.batches[batch])

            def tell(
                expert: int,
                side: str,
                _: Tensor,
                tokens: Tensor,
                output: Tensor,
                valid: Tensor = valid,
            ) -> None:
                keep = valid[tokens]
                if side == "out" and bool(keep.any()):
                    observe(expert, output[keep], watch.gates(expert)[keep])

            with torch.no_grad(), ExpertWatch(self.experts, tell) as watch:
                self._outputs.append(self.run(batch))

    @property
    def outputs(self) -> ActivationStore:
        """What left it, [batch, length, hidden] per batch, as far as batches were run."""
        return self._outputs

    def valid(self, batch: int, hidden: Tensor) -> Tensor:
        """Rows [valid tokens, hidden] of hidden states [batch, length, hidden], without padding."""
        valid, _ = self._walk.valid(self._walk.batches[batch])
        return hidden.to(self._walk.device).reshape(-1, hidden.shape[-1])[valid]

    def output(self, batch: int) -> Tensor:
        """What leaves the block for one batch; weights must not change any more."""
        self._finish()
        return self._outputs[batch]

    def save_outputs(self) -> None:
        """Put the outputs on disk, so that a walk can start at the next block.

        The inputs of this block stay, those of the block before it go: until the caller has
        recorded this block as done, either point may be where the run resumes.
        """
        self._finish()
        self._outputs.save(self._walk.label)
        if self.index:
            ActivationStore(self._walk.folder(self.index - 1), 0).delete()

    def capture(
        self,
        observe: Observer,
        groups: Collection[str] | None = None,
        batches: Iterable[int] | None = None,
        *,
        onward: bool = False,
        ahead: bool = False,
    ) -> None:
        """Run batches with the present weights and report what enters each input group.

        Only valid tokens are reported, and to a group of an expert only those routed to it.
        The forward of a batch stands still as soon as all groups asked for have been reported, as
        far as the budget for activations allows, and goes on from there when groups ahead of it
        are asked for or `forward` is called. Changing a matrix that it has passed ends it.

        Args:
            observe: called per batch and group, in execution order; not for an expert that no
                token of the batch was routed to.
            groups: input groups to report; all of the block by default.
            batches: indices of the batches to run; all by default. Two walks in lockstep pair
                the inputs of one model with those of another batch by batch.
            onward: run to the end and keep the outputs, which spares `forward` where weights stay
                as they are. Batches must then come in order, over any number of calls; those that
                run at the same time may change places.
            ahead: stand still only where a part of the block begins and little is held, running
                ahead of what was asked for. For a block whose weights stay as they are.

        Raises:
            ModelError: the block has no such group.
            ValueError: `onward`, and the batches are out of order.
        """
        lanes, wanted = self.lanes, set(self._groups if groups is None else groups)
        unknown = wanted - set(self._groups)
        if unknown:
            raise ModelError(f"block {self.index} has no input group {min(unknown)!r}")
        for batch in range(len(self._walk.batches)) if batches is None else batches:
            if onward and batch // lanes.count != len(self._outputs) // lanes.count:
                raise ValueError(f"batch {len(self._outputs)} comes next, not {batch}")
            run = partial(self._capture_batch, batch, observe, wanted, onward, ahead)
            lanes.on(lanes.lane(batch), run)

    def _capture_batch(
        self, batch: int, observe: Observer, wanted: set[str], onward: bool, ahead: bool
    ) -> None:
        """Run one batch in its lane."""
        firsts = {members[0].tensor: members[0] for members in self._groups.values()}
        chosen = [matrix for matrix in firsts.values() if matrix.input_group in wanted]
        routed = {matrix.input_group for matrix in chosen if matrix.expert is not None}
        pending = {matrix.tensor for matrix in chosen if matrix.expert is None}
        valid, domains = self._walk.valid(self._walk.batches[batch])
        whole = bool(valid.all())

        def visit(name: str, inputs: Tensor) -> bool:
            group = firsts[name].input_group if name in firsts else ""
            if name in pending:
                rows = inputs.reshape(-1, inputs.shape[-1])
                observe(group, rows if whole else rows[valid], domains[valid])
                pending.discard(name)
            may_stand = group.endswith(".in") if ahead else bool(group)
            return bool(pending or routed or onward) or not may_stand

        def routed_to(expert: int, side: str, rows: Tensor, tokens: Tensor, _: Tensor) -> None:
            group = f"{self._walk.prefix(self.index)}experts.{expert}.{side}"
            keep = valid[tokens]
            if group in routed and bool(keep.any()):
                observe(group, rows[keep], domains[tokens[keep]])

        standing = self._standing[self.lanes.here]
        waiting = standing.take(batch, pending, anew=bool(routed))
        passage = waiting or Passage(lambda: self.run(batch))
        with ExitStack() as stack:
            for matrix in self.matrices:
                if matrix.info.expert is None:
                    stack.enter_context(self._telling(matrix.info, passage))
            if routed:
                stack.enter_context(ExpertWatch(self.experts, routed_to))
            if self._walk.parks:
                stack.enter_context(introduced(self.module, valid.numel(), passage))
            with torch.no_grad():
                output = passage.advance(visit)
        if output is not None and onward:
            self._outputs.put(batch, output)
        elif output is None and wanted != set(self._groups):
            standing.keep(batch, passage)
        elif output is None:  # nothing lies ahead that could still change
            passage.abandon()

    def _held_standing(self, batch: int) -> int:
        """Bytes that a forward of a batch holds while it stands still, at most."""
        return self._walk.batches[batch].mask.numel() * self._bytes_standing

    def _owned(self, batch: int) -> set[int]:
        """Addresses of storages that a forward of a batch may meet and that are not its own."""
        tensors = [*self.module.parameters(), *self.module.buffers(), *self.inputs.held(batch)]
        return {tensor.untyped_storage().data_ptr() for tensor in tensors}

    def _telling(self, matrix: Matrix, passage: Passage) -> RemovableHandle:
        """Let a forward tell its passage what a matrix is about to multiply."""
        return self.module_of(matrix).register_forward_pre_hook(
            lambda _, args: passage.arrive(matrix.tensor, args[0]), with_kwargs=False
        )

    def _fill(self) -> None:
        """Bring the module to life: whole tensors by name, experts into their fused tensors."""
        skeleton, walk = self._walk.skeleton, self._walk
        fused = {spot.parameter for spot in self._places.values() if spot.expert is not None}
        for name in fused:
            shape = skeleton.parameter(name).shape
            skeleton.assign(name, torch.empty(shape, dtype=walk.dtype, device=walk.device))
        for name, _ in walk.architecture.tensors():
            if name.startswith(walk.prefix(self.index)):
                self._put(name, walk._read(name))

    def _put(self, name: str, value: Tensor) -> None:
        """Copy a tensor of the disk's shape into the live module."""
        skeleton = self._walk.skeleton
        spot = self._places.get(name)
        if spot is None or spot.expert is None:
            skeleton.assign(self._walk.architecture.module_tensor(name), value)
        else:
            spot.view(skeleton.parameter(spot.parameter)).copy_(value)

    def _view(self, matrix: Matrix) -> Tensor:
        spot: Place = self._places[matrix.tensor]
        return spot.view(self._walk.skeleton.parameter(spot.parameter).detach())

    def _finish(self) -> None:
        if len(self._outputs) < len(self._walk.batches):
            self.forward()

    def _settle(self, name: str) -> None:
        """A forward that used a tensor which has changed since is worth nothing."""
        told = name in self._places and self._places[name].expert is None
        for lane, standing in enumerate(self._standing):
            if standing:
                self.lanes.on(lane, partial(standing.end, name if told else None))

    def close(self) -> None:
        """Finish, and free what only this block needed."""
        self._finish()
        self.inputs.free()
        self._changed.clear()  # the block may live until the next collection of cycles
        self._walk.skeleton.release(self.module)
        return_memory()
