"""Mixtures of experts: one tensor per expert on disk, all experts fused in the module tree.

transformers stacks the matrices of all experts into `gate_up_proj` [experts, 2·width, hidden]
and `down_proj` [experts, hidden, width]. On disk, and for whoever rounds or prunes, an expert
is three matrices; this module knows where each of them lies and which tokens it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from compressor.errors import CompressorError
from compressor.model.architecture import Architecture
from compressor.model.matrices import Matrix

_FUSED = {"gate": "gate_up_proj", "up": "gate_up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class Place:
    """Where a matrix lies in the module tree.

    Attributes:
        parameter: name of the parameter that holds it.
        rows: its rows in the parameter, or in its expert's part of it; None for all.
        expert: index into the leading dimension; None when the parameter is the matrix.
        transposed: stored [in, out] (Conv1D).
    """

    parameter: str
    rows: slice | None
    expert: int | None
    transposed: bool

    def view(self, parameter: Tensor) -> Tensor:
        """The matrix [out, in] as a view of its parameter."""
        view = parameter if self.expert is None else parameter[self.expert]
        view = view if self.rows is None else view[self.rows]
        return view.T if self.transposed else view


def place(architecture: Architecture, matrix: Matrix) -> Place:
    """Where a matrix on disk lies in the module tree."""
    name = architecture.module_tensor(matrix.tensor)
    if matrix.expert is None:
        return Place(name, None, None, matrix.transposed_on_disk)
    width = architecture.expert_intermediate
    rows = {"gate": slice(0, width), "up": slice(width, 2 * width), "down": None}[matrix.role]
    folder = name[: name.index(".experts.")]
    return Place(f"{folder}.experts.{_FUSED[matrix.role]}", rows, matrix.expert, False)


def fused(parameter: Tensor, parts: Sequence[tuple[Place, Tensor]]) -> Tensor:
    """A parameter with other matrices in place of its own, through which gradients reach them.

    Args:
        parameter: as the module has it.
        parts: matrices [out, in] in its dtype, and where they lie in it.
    """
    place, weight = parts[0]
    if place.expert is None:
        return weight.T if place.transposed else weight
    experts = list(parameter.detach().unbind())
    for expert in {place.expert for place, _ in parts if place.expert is not None}:
        own = [(place.rows, weight) for place, weight in parts if place.expert == expert]
        experts[expert] = _with_rows(experts[expert], own)
    return torch.stack(experts)


def _with_rows(matrix: Tensor, parts: Sequence[tuple[slice | None, Tensor]]) -> Tensor:
    """A matrix [out, in] with some of its rows, or all, replaced."""
    for rows, weight in parts:
        start, stop = (0, len(matrix)) if rows is None else (rows.start, rows.stop)
        matrix = torch.cat([matrix[:start], weight, matrix[stop:]])
    return matrix


class ExpertWatch(TorchFunctionMode):
    """While entered, reports what each expert's matrices multiply.

    The eager forward of every mixture that we know gathers the tokens of one expert, applies
    `gate_up_proj[expert]`, and applies `down_proj[expert]` to what comes of it. Matrix products
    whose weight lies inside one of the two parameters are told apart by their offset in it.

    Args:
        experts: the module that holds both parameters.
        report: called with (expert, "in" or "out", rows [tokens, width], token numbers [tokens],
            what the product made of the rows).
    """

    def __init__(
        self, experts: nn.Module, report: Callable[[int, str, Tensor, Tensor, Tensor], None]
    ) -> None:
        super().__init__()
        self._parameters = {
            "in": experts.get_parameter("gate_up_proj"),
            "out": experts.get_parameter("down_proj"),
        }
        self._report = report
        self._hidden = torch.empty(0)
        self._chosen = torch.empty(0)
        self._gates = torch.empty(0)
        self._handle = experts.register_forward_pre_hook(self._enter_experts, with_kwargs=True)

    def __exit__(self, *exception: Any) -> None:
        self._handle.remove()
        super().__exit__(*exception)  # type: ignore[no-untyped-call]

    def _enter_experts(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note the tokens [tokens, hidden], and experts and gates of each [tokens, top k]."""
        values = (*args, *kwargs.values())
        self._hidden, self._chosen, self._gates = values[:3]

    def gates(self, expert: int) -> Tensor:
        """What the outputs of an expert are multiplied by, one number a token, in their order."""
        return self._gates.T[(self._chosen == expert).T]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        output = func(*args, **(kwargs or {}))
        if func is nn.functional.linear:
            for side, parameter in self._parameters.items():
                if _inside(args[1], parameter):
                    self._seen(side, parameter, args[0], args[1], output)
        return output

    def _seen(
        self, side: str, parameter: Tensor, rows: Tensor, weight: Tensor, output: Tensor
    ) -> None:
        expert = weight.storage_offset() // parameter[0].numel()
        tokens = (self._chosen == expert).T.nonzero()[:, 1]
        if side == "in" and not torch.equal(self._hidden[tokens], rows):
            raise CompressorError(
                f"expert {expert} saw other tokens than the router chose for it;"
                " this version of transformers computes the mixture in a way we do not know"
            )
        self._report(expert, side, rows, tokens, output)


def _inside(weight: Tensor, parameter: Tensor) -> bool:
    """Whether `weight` is one expert's part of `parameter`, sharing its memory."""
    return (
        weight.shape == parameter.shape[1:]
        and weight.untyped_storage().data_ptr() == parameter.untyped_storage().data_ptr()
    )
