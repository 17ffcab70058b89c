"""Stand where attention hands keys and values to its cache: look at them, or round them.

transformers gives every attention a cache, or None where nothing is kept, and attention computes
with what `update` returns. A stand-in for the cache therefore sees keys after the rotary
embedding and values, for every token, whether a cache is behind it or not. compressed-tensors
does the same to the checkpoints that it loads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from compressor.model.architecture import Architecture
from compressor.numerics.cache import round_to_cache

Entering = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Called with keys and values [batch, heads, length, head_dim]; gives what is kept of them."""


def round_cache(model: nn.Module, architecture: Architecture) -> None:
    """Let a dense model compute with keys and values as an engine's cache will hold them."""
    if architecture.cache is None:
        return
    paths = architecture.cached_attention
    for path, (keys, values) in zip(paths, architecture.cache.scales, strict=True):
        enter_cache(model.get_submodule(path), _Rounding(keys, values))


def enter_cache(attention: nn.Module, entering: Entering) -> RemovableHandle:
    """Put something in front of the cache of an attention module, until the handle is removed."""

    def stand_in(
        _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**kwargs, _CACHE: _StandIn(kwargs.get(_CACHE), entering)}

    return attention.register_forward_pre_hook(stand_in, with_kwargs=True)


_CACHE = "past_key_values"


class _StandIn:
    """A cache with something in front of it; where there is none, what enters is what is kept."""

    def __init__(self, cache: Any, entering: Entering) -> None:
        self._cache, self._entering = cache, entering

    def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
        keys, values = self._entering(keys, values)
        if self._cache is None:
            return keys, values
        return self._cache.update(keys, values, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cache, name)


class _Rounding:
    """Both rounded; gradients pass as if they were not."""

    def __init__(self, keys: float, values: float) -> None:
        self._keys, self._values = keys, values

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        return _rounded(keys, self._keys), _rounded(values, self._values)


def _rounded(states: Tensor, scale: float) -> Tensor:
    rounded = round_to_cache(states.detach(), scale)
    return rounded + (states - states.detach()) if states.requires_grad else rounded
