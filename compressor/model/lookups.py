"""What is looked up in an embedding, as a leaf that gradients reach."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode


class LookUps(TorchFunctionMode):
    """While entered, keeps the rows that a module looks up, before it does anything else to them.

    Families differ in what follows (Gemma scales within the module, Granite behind it); the
    lookup itself is the same in all.

    Args:
        embedding: the module; its weight must be in place.

    Attributes:
        rows: [..., width], requires gradients.
    """

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self._weight = embedding.get_parameter("weight")
        self.rows = torch.empty(0)

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        if func is nn.functional.embedding and args[1] is self._weight:
            self.rows = found.detach().requires_grad_()
            return self.rows
        return found
