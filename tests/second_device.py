"""A device that the processor plays: tensors that say they lie on it, and may not be mixed.

Mistakes of placement show only where there are two memories. Here every tensor made on the device
is a wrapper around one of the processor; an operation whose arguments lie in different memories is
refused as an accelerator refuses it. Nothing is said about speed, kernels or streams.

Importing this registers the device with torch for the rest of the process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten


class _Module(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("played", _Module())
DEVICE = torch.device("played", 0)

_CROSSING = {aten._to_copy, aten.copy_, aten.copy, aten.is_same_size}
_INDEXING = {aten.index, aten.index_put_, aten.index_put, aten._unsafe_index}
# Numbers of no dimension may come from the processor here, as in all that goes element by element.
_TAKE_NUMBERS = {aten.fill_, aten.fill, aten.masked_fill, aten.masked_fill_, *_INDEXING}


class Elsewhere(torch.Tensor):
    """A tensor in the other memory.

    Attributes:
        numbers: the same tensor in this memory.
    """

    numbers: Tensor

    @staticmethod
    def __new__(cls, numbers: Tensor) -> Elsewhere:
        made: Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            numbers.shape,
            strides=numbers.stride(),
            storage_offset=numbers.storage_offset(),
            dtype=numbers.dtype,
            device=DEVICE,
        )
        made.numbers = numbers
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    @property
    def data(self) -> Tensor:
        return Elsewhere(self.numbers)

    @data.setter
    def data(self, value: Tensor) -> None:
        assert isinstance(value, Elsewhere)
        assert value.dtype == self.dtype
        self.numbers = value.numbers

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return Elsewhere(self.numbers.clone())

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def tolist(self) -> Any:
        return self.numbers.tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"Elsewhere({self.numbers!r})"


class _Devices(TorchDispatchMode):
    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    composite, shows = _facts(func)
    if composite:  # what inference mode leaves whole
        with _Devices():
            return func.decompose(*args, **kwargs)
    tensors = _tensors((*args, *kwargs.values()))
    there = [tensor for tensor in tensors if isinstance(tensor, Elsewhere)]
    asked = kwargs.get("device")
    if asked is not None:
        lands = torch.device(asked).type == DEVICE.type
    else:
        lands = isinstance(args[0], Elsewhere) if func is aten.copy_.default else bool(there)
    if there:
        _require_one_memory(func, args, tensors)
    if lands and kwargs.get("generator") is not None:
        raise RuntimeError(f"{func}: a generator of the processor cannot draw on {DEVICE.type}")
    if func is aten._fused_sdp_choice.default:
        return 0  # plain products: what else there is belongs to one kind of device
    if asked is not None and (lands or there):
        kwargs = {**kwargs, "device": torch.device("cpu"), "pin_memory": False}
    kept = shows and torch.is_inference_mode_enabled() and there and not there[0].is_inference()
    with torch.inference_mode(False) if kept else nullcontext(), torch.no_grad():
        out = func(*_each(args, _here), **{name: _each(one, _here) for name, one in kwargs.items()})
        if not lands:
            return out
        known = {id(tensor.numbers): tensor for tensor in there}
        assert all(tensor.shape == tensor.numbers.shape for tensor in there), func
        return _each(out, lambda one: known[id(one)] if id(one) in known else Elsewhere(one))


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    if isinstance(found, tuple | list):
        return [tensor for one in found for tensor in _tensors(one)]
    return []


def _each(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(found, Tensor):
        return change(found)
    if isinstance(found, tuple | list):
        return type(found)(_each(one, change) for one in found)
    return found


def _here(tensor: Tensor) -> Tensor:
    return tensor.numbers if isinstance(tensor, Elsewhere) else tensor


@cache
def _facts(func: Any) -> tuple[bool, bool]:
    """Whether it is made of others; whether it gives a view, which shares a count of changes."""
    found = [result.alias_info for result in func._schema.returns]
    return func._can_decompose(), any(one is not None and not one.is_write for one in found)


def _require_one_memory(func: Any, args: Any, tensors: Sequence[Tensor]) -> None:
    packet = func.overloadpacket
    if packet in _CROSSING:
        return
    strangers = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere)]
    if packet in _INDEXING and isinstance(args[0], Elsewhere):
        strangers = [one for one in strangers if not any(one is index for index in args[1])]
    if packet in _TAKE_NUMBERS or torch.Tag.pointwise in func.tags:
        strangers = [one for one in strangers if one.ndim]
    if strangers:
        shapes = [tuple(one.shape) for one in strangers]
        raise RuntimeError(f"{func}: tensors {shapes} are not on {DEVICE.type} as the others are")


@contextmanager
def second_device() -> Iterator[torch.device]:
    """Play the device."""
    before = torch._C._only_lift_cpu_tensors()
    replaced = torch.__future__.get_overwrite_module_params_on_conversion()
    torch._C._set_only_lift_cpu_tensors(True)  # `torch.tensor` makes here, then copies
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # wrappers keep their dtype
    try:
        with _Devices():
            yield DEVICE
    finally:
        torch._C._set_only_lift_cpu_tensors(before)
        torch.__future__.set_overwrite_module_params_on_conversion(replaced)
