"""Processes that train one model together: which one leads, and what they tell each other.

`torchrun` or `accelerate launch` starts the same command several times. One process leads: it alone
plans, writes, measures and reports. The others wait, and run beside it the stages that train: each
sees its share of the windows of every update. It holds its share of the weights, of their gradients
and of the moments (FSDP2), or all of a draft, which is small. What they compute together is what
one process computes alone, but for the order of sums.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from compressor.errors import ResourceError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Item = TypeVar("Item")

# Others wait as long as the leader takes for stages of its own; a launcher ends what has failed.
_PATIENCE = timedelta(days=30)

# Seconds in which nobody else needs the interpreter. Sharded models leave their group in caches of
# torch, so that its threads outlive it; one that has yet to drop the tensor of a last sum needs the
# interpreter for that, and where it finds it shutting down, the process ends with SIGABRT.
_LAST_WORDS = 0.2


@dataclass(frozen=True)
class Team:
    """One process among those that train together; alone by default.

    Attributes:
        rank: its number; 0 leads.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def alone(self) -> bool:
        """Whether there is nobody else."""
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> Sequence[Item]:
        """What this process takes of the items; all processes together take each one once."""
        return items[self.rank :: self.size]

    def turns(self, count: int) -> list[tuple[int, bool]]:
        """Numbers below `count`, as many on every process, and whether the result is to be kept.

        A sharded model is run by all processes at once, so that one without anything left to do
        repeats what another one has.
        """
        rounds = -(-count // self.size)
        numbers = range(self.rank, rounds * self.size, self.size)
        return [(number % count, number < count) for number in numbers]

    def add(self, tensor: Tensor) -> Tensor:
        """Sum over all processes, in place."""
        if not self.alone:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def wait(self) -> None:
        """Go on when all processes are here."""
        if not self.alone:
            import torch

            self.add(torch.zeros(()))

    def gather(self, said: Any) -> list[Any]:
        """What every process says, by its number: any objects."""
        heard = [said] * self.size
        if not self.alone:
            from torch import distributed

            distributed.all_gather_object(heard, said)
        return heard

    def add_gradients(self, parameters: Mapping[str, Tensor]) -> None:
        """Sum the gradients of parameters that every process has whole."""
        for parameter in parameters.values():
            if parameter.grad is not None and not _is_shard(parameter):
                self.add(parameter.grad)

    def agree(self, said: bool) -> bool:
        """What the leader says."""
        heard = self.hear(said)
        assert isinstance(heard, bool)
        return heard

    def hear(self, said: Any) -> Any:
        """What the leader says: any object; others say nothing that counts.

        Raises:
            ResourceError: the leader is gone.
        """
        if self.alone:
            return said
        import torch
        from torch import distributed

        words = [said]
        try:
            distributed.broadcast_object_list(words, src=0, device=torch.device("cpu"))
        except RuntimeError:
            if self.leads:
                raise
            raise ResourceError("the leading process has ended", "what it wrote says why") from None
        return words[0]

    def shard(self, model: Any, blocks: str, device: torch.device) -> None:
        """Leave every process its share of the weights; blocks are put together one at a time.

        Parameters of the model are others afterwards. Gradients are sums over processes.

        Args:
            model: a live model, the same on every process.
            blocks: path of its list of decoder blocks.
            device: where it computes; one that has not room for all of it will do.
        """
        if self.alone:
            return
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device.type, (self.size,))
        for module in (*model.get_submodule(blocks), model):
            fully_shard(module, mesh=mesh, reshard_after_forward=True)
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other kind

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor with the shares of all processes, which all must ask for; no gradient."""
        found = tensor.detach()
        return found.full_tensor() if _is_shard(found) else found  # type: ignore[attr-defined]

    def like(self, parameter: Tensor, tensor: Tensor) -> Tensor:
        """A tensor on the device of a parameter; where that is a share, the same share."""
        tensor = tensor.to(parameter.device)
        if not _is_shard(parameter):
            return tensor
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(parameter, DTensor)
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(tensor, mesh, placements, src_data_rank=None)


ALONE = Team()


def _is_shard(tensor: Tensor) -> bool:
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


@contextmanager
def assembled() -> Iterator[Team]:
    """The processes that a launcher has started with this one; alone where none has."""
    if "TORCHELASTIC_RUN_ID" not in os.environ or os.environ["WORLD_SIZE"] == "1":
        yield ALONE
        return
    import torch
    from torch import distributed

    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Team(distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
        time.sleep(_LAST_WORDS)
