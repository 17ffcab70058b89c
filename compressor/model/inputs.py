"""Let a dense model round the inputs of its matrices, as the engines will that serve it."""

from __future__ import annotations

from typing import Any

from torch import nn

from compressor.model.architecture import Architecture
from compressor.numerics.activations import round_inputs as rounded
from compressor.types import ActivationScheme


def round_inputs(model: nn.Module, architecture: Architecture) -> None:
    """Put a rounding before every matrix whose `activations` ask for one.

    Hooks that are registered later see the rounded inputs: so do the Hessians of a rounder.
    """
    for matrix in architecture.matrices:
        if matrix.activations is not None:
            path = architecture.module_tensor(matrix.tensor).removesuffix(".weight")
            model.get_submodule(path).register_forward_pre_hook(_Rounding(matrix.activations))


class _Rounding:
    """A forward pre-hook of a linear layer; gradients pass as if nothing were rounded."""

    def __init__(self, scheme: ActivationScheme) -> None:
        self._scheme = scheme

    def __call__(self, _: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs = args[0]
        steps = rounded(inputs.detach(), self._scheme)
        if inputs.requires_grad:
            steps = steps + (inputs - inputs.detach())
        return (steps, *args[1:])
