"""Formats of weights other than integers: what each of them fixes, and what goes with it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from compressor.types import ACTIVATIONS, ActivationScheme, WeightScheme

if TYPE_CHECKING:
    from compressor.model.architecture import Architecture
    from compressor.model.matrices import Matrix


@dataclass(frozen=True)
class WeightFormat:
    """A float format.

    Attributes:
        scheme: its only grid.
        inputs: how inputs can be rounded beside it, by the value of the option `activations`.
        dtype: that the model must have; None for any.
    """

    scheme: WeightScheme
    inputs: Mapping[str, ActivationScheme] = field(default_factory=dict)
    dtype: str | None = None


FORMATS: Mapping[str, WeightFormat] = {
    "fp8": WeightFormat(
        WeightScheme(8, None, number="float"),
        {"fp8": ACTIVATIONS["fp8"]},
    ),
    "fp8-block": WeightFormat(
        WeightScheme(8, 128, number="float", rows=128),
        {"fp8": ACTIVATIONS["fp8-g128"]},
    ),
    "mxfp4": WeightFormat(WeightScheme(4, 32, number="float", scales="e8m0"), dtype="bfloat16"),
    "nvfp4": WeightFormat(WeightScheme(4, 16, number="float", scales="e4m3"), dtype="bfloat16"),
}
"""By the value of the option `weights`; `int`, which is free, is none of them."""

_INTEGER_INPUTS = {"int8": ACTIVATIONS["int8"]}
_NAMES = {("dense", 1): "FP8 channel", ("dense", 128): "FP8 block", ("e8m0", 1): "MXFP4"}
_NAMES |= {("e4m3", 1): "NVFP4"}


def inputs_of(weights: str) -> Mapping[str, ActivationScheme]:
    """How inputs can be rounded beside these weights, by the value of `activations`."""
    return FORMATS[weights].inputs if weights in FORMATS else _INTEGER_INPUTS


def fixed_by(weights: str) -> dict[str, Any]:
    """Options whose values the format decides; none for integers."""
    return _fixed(FORMATS[weights].scheme) if weights in FORMATS else {}


def _fixed(scheme: WeightScheme) -> dict[str, Any]:
    group = "channel" if scheme.group_size is None else scheme.group_size
    return {"bits": scheme.bits, "group_size": group, "symmetry": scheme.symmetry}


def format_problems(
    weights: str, written: Mapping[str, Any], architecture: Architecture, chosen: Sequence[Matrix]
) -> Iterator[tuple[str, str, str]]:
    """(option, message, hint) for everything that a float format rules out.

    Args:
        weights: a key of `FORMATS`.
        written: the stage's options, by name.
        architecture: the model.
        chosen: what the stage rounds.
    """
    form = FORMATS[weights]
    for name, value in _fixed(form.scheme).items():
        if written[name] != value:
            message = f"{weights} has {name} {value}, not {written[name]}"
            yield name, message, f"leave `{name}` out, or write `weights: int`"
    if written["overrides"]:
        message = f"{weights} has one grid, which no override can change"
        yield "overrides", message, "leave matrices out with `ignore`, or write `weights: int`"
    if form.dtype and architecture.dtype != form.dtype:
        message = f"{weights} is read back as {form.dtype}, and the model is {architecture.dtype}"
        yield "weights", message, "convert the model to bfloat16, or write `weights: int`"
    yield from _size_problems(weights, form.scheme, chosen)


def _size_problems(
    weights: str, scheme: WeightScheme, chosen: Sequence[Matrix]
) -> Iterator[tuple[str, str, str]]:
    """Blocks and groups must divide what they cover."""
    size = scheme.group_size or 1
    inner = [matrix for matrix in chosen if matrix.block is not None]
    bad = [m for m in inner if m.shape[0] % scheme.rows or m.shape[1] % size]
    if bad:
        what = f"blocks of {scheme.rows} x {size}" if scheme.rows > 1 else f"groups of {size}"
        more = f" (and {len(bad) - 1} more matrices)" if len(bad) > 1 else ""
        message = f"{what} do not divide {bad[0].name}, which is {list(bad[0].shape)}{more}"
        yield "weights", message, "leave them out with `ignore`, or write `weights: fp8`"


def float_label(scheme: WeightScheme, inputs: ActivationScheme | None) -> str:
    """Such as `FP8A8 channel` or `NVFP4`."""
    name, _, block = _NAMES[scheme.scales, scheme.rows].partition(" ")
    return f"{name}{f'A{inputs.bits}' if inputs else ''}{f' {block}' if block else ''}"
