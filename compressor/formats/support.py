"""What can be exported, and what loads it: rules on data, so that the plan refuses before work.

Compressed-tensors, measured with transformers 5.23 and compressed-tensors 0.20 by reloading tiny
models
(`tests/formats/test_compressed_tensors.py` repeats it):

- Symmetric and full-range codes of 2 to 8 bits, by group or channel, mixed freely: load as is.
- Asymmetric *pack-quantized*: the packed zero-points do not fit the placeholder that the library
  makes, and loading fails, unless the configuration says `dequantize`; that route reads one
  scheme for all matrices. *int-quantized* zero-points are not packed and load as is.
- Quantized embeddings: likewise only through `dequantize`, tied or not, except for 8 bits by
  channel, symmetric, *int-quantized*: those load beside any other scheme. A tied head is then a
  second module with the same codes, which wants scales under its own name. Not Gemma's, whose
  module holds a number besides, which loading then misses.
- Rounded inputs, beside symmetric weights of any layout: load as is.
- Floats (fp8 by channel or block, MXFP4, NVFP4) in linear layers and heads: load as is. The two of
  4 bits arrive as bf16 whatever the checkpoint is, so that it must be bf16.
- Experts of a mixture: packed per expert under their names on disk, symmetric, one scheme for
  all; once anything is quantized, dense experts do not load, nor do int-quantized ones.
- GPT-2's Conv1D stores [in, out], so groups along the last dimension run over outputs: refused.

The other containers have their rules in `exchange`; what engines load is in `capabilities`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from compressor.formats.capabilities import ENGINES, Container, Engine, Limits
from compressor.types import ActivationScheme, CacheScheme, Scales, WeightScheme

Format = Literal[
    "pack-quantized",
    "int-quantized",
    "float-quantized",
    "mxfp4-pack-quantized",
    "nvfp4-pack-quantized",
]
Form = Literal["auto", Format]
LAYOUTS: tuple[Form, ...] = ("auto", *get_args(Format))
Kind = Literal["linear", "head", "embedding", "expert", "router", "conv1d"]


@dataclass(frozen=True)
class Target:
    """A matrix as the export sees it.

    Attributes:
        name: on disk, without `.weight`.
        shape: [out, in].
        kind: `head` is an untied output head; a tied one is part of the `embedding`.
        scheme: None when the matrix stays dense.
        activations: how its inputs are rounded; None when they are not.
        scaled: an embedding whose module multiplies what it looks up.
        rounding: number of the stage that rounded it, among those that round; 0 while dense.
    """

    name: str
    shape: tuple[int, int]
    kind: Kind
    scheme: WeightScheme | None
    activations: ActivationScheme | None = None
    scaled: bool = False
    rounding: int = 0


@dataclass(frozen=True)
class Loading:
    """What programs make of an export, of those that read its format.

    Attributes:
        titles: of those that load it, on one machine or another.
        refusals: titles of those that do not, as a sentence names them -> why.
    """

    titles: tuple[str, ...]
    refusals: Mapping[str, str]


_FLOAT_LAYOUTS: Mapping[Scales, Format] = {
    "dense": "float-quantized",
    "e8m0": "mxfp4-pack-quantized",
    "e4m3": "nvfp4-pack-quantized",
}
SCALED_EMBEDDINGS = ("gemma2", "gemma3_text")
"""`model_type` of families whose embedding multiplies what it looks up."""

ABSMAX: Mapping[str, str] = {"nf4": "NF4", "absmax": "rounded for LLM.int8"}
"""Numbers of bitsandbytes -> how a matrix of them is called."""
_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def format_of(
    scheme: WeightScheme, activations: ActivationScheme | None, form: Form = "auto"
) -> Format:
    """The layout of a matrix; `auto` is the one that engines load, packed where it may be.

    Kernels that multiply int8 by int8 read weights of a byte each. Floats have one layout each.
    """
    if scheme.number == "float":
        return _FLOAT_LAYOUTS[scheme.scales]
    if form != "auto":
        return form
    bytewise = activations is not None and scheme.bits == 8
    return "int-quantized" if bytewise else "pack-quantized"


def layout_of(target: Target, form: Form) -> Format:
    """The layout of a quantized matrix in an export to `form`.

    An embedding of a byte a code loads beside any other scheme, a packed one does not.
    """
    scheme = target.scheme
    assert scheme is not None
    looked_up = form == "auto" and target.kind == "embedding" and not target.scaled
    if looked_up and _by_channel(scheme) and scheme.symmetry != "asymmetric":
        return "int-quantized"
    return format_of(scheme, target.activations, form)


def loads_beside_others(target: Target, form: Form) -> bool:
    """Whether a quantized embedding loads whatever schemes the other matrices have.

    If the head is tied to it, the export then holds its scales a second time, for the head.
    """
    bytewise = target.kind == "embedding" and not target.scaled
    return bytewise and layout_of(target, form) == "int-quantized"


def needs_dequantize(targets: Iterable[Target], form: Form) -> bool:
    """Whether transformers loads the export only with `dequantize` in its configuration."""
    return any(
        (target.kind == "embedding" and not loads_beside_others(target, form))
        or _has_packed_zeros(target, form)
        for target in targets
        if target.scheme is not None
    )


def _has_packed_zeros(target: Target, form: Form) -> bool:
    scheme = target.scheme
    if scheme is None or scheme.symmetry != "asymmetric":
        return False
    return layout_of(target, form) == "pack-quantized"


def export_problems(targets: Sequence[Target], form: Form = "auto") -> list[str]:
    """Why these matrices cannot be exported to `form` so that transformers loads them.

    Returns:
        One sentence per broken rule; empty when the export will load.
    """
    quantized = [target for target in targets if target.scheme is not None]
    problems = [sentence for target in quantized for sentence in _matrix_problems(target, form)]
    problems += _expert_problems(targets, form)
    if needs_dequantize(quantized, form):
        problems += _dequantize_problems(quantized)
    return problems


def cache_problems(
    targets: Sequence[Target], container: Container, cache: CacheScheme
) -> list[str]:
    """Why a rounded cache cannot be exported so; a sentence per rule.

    Args:
        targets: every matrix of the model.
        container: what lies on disk.
        cache: how keys and values are rounded.
    """
    if container not in LAYOUTS:
        return [
            f"{container} cannot say that the cache is rounded (to {cache.name}), so that it would "
            "not give what is measured"
        ]
    problems = []
    if needs_dequantize(targets, container):
        problems.append(
            "quantized embeddings and asymmetric packed weights load in transformers only where "
            "the cache is not rounded"
        )
    if any(target.kind == "expert" and target.scheme is None for target in targets):
        problems.append("transformers loads experts beside a rounded cache only when quantized")
    return problems


def _dequantize_problems(quantized: Sequence[Target]) -> Iterable[str]:
    """That route reads one scheme for all matrices, and forgets how inputs are rounded."""
    embeddings = any(target.kind == "embedding" for target in quantized)
    cause = "quantized embeddings load" if embeddings else "asymmetric packed weights load"
    schemes = {target.scheme for target in quantized}
    if len(schemes) > 1:
        yield (
            f"{cause} in transformers only when every quantized matrix has one scheme, "
            f"and here there are {len(schemes)}"
        )
    if any(target.activations is not None for target in quantized):
        yield f"{cause} in transformers only where inputs are not rounded"


def _matrix_problems(target: Target, form: Form) -> Iterable[str]:
    assert target.scheme is not None
    scheme, (out, in_features) = target.scheme, target.shape
    layout = layout_of(target, form)
    if target.kind == "conv1d":
        yield (
            f"{target.name} is a Conv1D stored as [in, out], and compressed-tensors groups "
            "along the last dimension, which there is the output"
        )
    if scheme.number in ABSMAX:
        yield f"{target.name} is {ABSMAX[scheme.number]}, which only bitsandbytes holds"
    if scheme.number == "float" and target.kind in ("expert", "embedding"):
        yield f"{target.name} is an {target.kind}, which transformers loads with integer codes only"
    if out % scheme.rows:
        yield f"{target.name} has {out} outputs, not a multiple of {scheme.rows}"
    if target.kind == "router":
        yield f"{target.name} is a router, which compressed-tensors cannot hold"
    if not 2 <= scheme.bits <= 8:
        yield f"{target.name} has {scheme.bits}-bit codes; compressed-tensors packs 2 to 8"
    if scheme.group_size is not None and in_features % scheme.group_size:
        yield f"{target.name} has {in_features} inputs, not a multiple of {scheme.group_size}"
    if scheme.bits == 4 and scheme.symmetry == "asymmetric" and out <= 8:
        # One packed word per column: compressed-tensors 0.20 fails to view it as bytes.
        yield f"{target.name} has {out} outputs; 4-bit zero-points unpack only from 9 up"
    if layout == "int-quantized" and target.activations is None and not _by_channel(scheme):
        yield (
            f"{target.name}: int-quantized without rounded inputs holds 8-bit codes with one "
            "scale per output channel"
        )


def _by_channel(scheme: WeightScheme) -> bool:
    return scheme.bits == 8 and scheme.group_size is None


def _expert_problems(targets: Sequence[Target], form: Form) -> Iterable[str]:
    experts = [target for target in targets if target.kind == "expert"]
    if not experts or all(target.scheme is None for target in targets):
        return
    schemes = {target.scheme for target in experts}
    if None in schemes:
        yield (
            "transformers loads a quantized mixture of experts only when all experts are "
            f"quantized, and {next(t.name for t in experts if t.scheme is None)} is not"
        )
    if len(schemes - {None}) > 1:
        yield f"experts must share one scheme to load in transformers, and have {len(schemes)}"
    if any(scheme is not None and scheme.symmetry == "asymmetric" for scheme in schemes):
        yield "transformers cannot load experts with zero-points; use a symmetric scheme"
    if form == "int-quantized":
        yield "transformers cannot load int-quantized experts; use pack-quantized"


def engine_problems(
    engine: str, targets: Sequence[Target], form: Container, cache: CacheScheme | None = None
) -> list[str]:
    """Why an engine would not load an export, or compute otherwise than was measured.

    Args:
        engine: a key of `ENGINES`.
        targets: every matrix of the model.
        form: what lies on disk.
        cache: how keys and values are rounded; None when they are not.

    Returns:
        A sentence per broken rule; empty when it loads.
    """
    loads = ENGINES[engine].containers
    if unknown := _unknown(ENGINES[engine], targets, form):
        return [f"{engine} does not load {unknown}; it loads {', '.join(loads)}"]
    found = _known_problems(ENGINES[engine], targets, form, cache)
    return [f"{engine}: {sentence}" for sentence in found]


def loading(
    targets: Sequence[Target], form: Container, cache: CacheScheme | None = None
) -> Loading:
    """Who loads an export; arguments as in `engine_problems`, whose rules decide."""
    faults = _faults(targets, form, cache)
    refusing: dict[str, list[str]] = {}
    for title, found in faults.items():
        if found:
            refusing.setdefault(first_of(found), []).append(title)
    return Loading(
        tuple(title for title, found in faults.items() if not found),
        {_listed(titles): why for why, titles in refusing.items()},
    )


def _faults(
    targets: Sequence[Target], form: Container, cache: CacheScheme | None
) -> dict[str, list[str]]:
    """By title of every program that reads the format: why it would not load the export."""
    same_format = set(get_args(Format)) if form in LAYOUTS else {form}
    faults: dict[str, list[str]] = {}
    for engine in ENGINES.values():
        if same_format.isdisjoint(engine.containers):
            continue
        unknown = _unknown(engine, targets, form)
        layout = [f"its layout is {unknown}"] if unknown else []
        found = layout or _known_problems(engine, targets, form, cache)
        if not found or engine.title not in faults:  # one of its machines is enough
            faults[engine.title] = found
    return faults


def first_of(sentences: Sequence[str]) -> str:
    """The first of many sentences of one kind, since a model has hundreds of matrices; or ""."""
    if len(sentences) < 2:
        return "".join(sentences)
    return f"{sentences[0]} (and {len(sentences) - 1} more problems like these)"


def _listed(titles: Sequence[str]) -> str:
    *others, last = titles
    return f"{', '.join(others)} and {last}" if others else last


def _unknown(engine: Engine, targets: Sequence[Target], form: Container) -> Container | None:
    """What the export holds and the engine cannot read at all; None where there is no such."""
    held = {_container(target, form) for target in targets if target.scheme is not None}
    if form == "auto" and not held:  # any layout that it reads will do
        held = {*get_args(Format)} & {*engine.containers} or {"pack-quantized"}
    return min((held or {form}) - {*engine.containers, "auto"}, default=None)


def _known_problems(
    engine: Engine, targets: Sequence[Target], form: Container, cache: CacheScheme | None
) -> list[str]:
    """Which limits an export breaks, all of whose containers the engine reads."""
    quantized = [target for target in targets if target.scheme is not None]
    held = [(engine.containers[_container(target, form)], target) for target in quantized]
    forgets = cache is not None and cache.name not in engine.caches
    problems = [engine.cache_fault] if forgets else []
    if not all(limits.mixed_fused for limits, _ in held):
        problems += _fused_problems(targets)
    for limits, target in held:
        problems += _limit_problems(limits, target)
    return problems


def _container(target: Target, form: Container) -> Container:
    """What holds a matrix; that of compressed-tensors may depend on its scheme."""
    if target.scheme is None or form not in LAYOUTS:
        return form
    return layout_of(target, form)


def _limit_problems(limits: Limits, target: Target) -> Iterable[str]:
    assert target.scheme is not None
    scheme = target.scheme
    yield from _input_problems(limits, target, scheme)
    if target.kind == "embedding" and not limits.embeddings:
        yield f"{target.name} is a quantized embedding; embeddings must be dense"
    if scheme.bits not in limits.bits:
        widths = ", ".join(str(bits) for bits in sorted(limits.bits))
        yield f"{target.name} has {scheme.bits}-bit codes; it loads {widths}"
    if scheme.symmetry not in limits.symmetries:
        yield f"{target.name} is {scheme.symmetry}; grids must be symmetric"
    if any(size % limits.multiple for size in target.shape):
        yield f"{target.name} is {list(target.shape)}; sizes must be multiples of {limits.multiple}"
    if scheme.group_size is not None and scheme.group_size % limits.group_multiple:
        yield (
            f"{target.name} has groups of {scheme.group_size}; "
            f"they must be multiples of {limits.group_multiple}"
        )


def _input_problems(limits: Limits, target: Target, scheme: WeightScheme) -> Iterable[str]:
    inputs = target.activations
    if inputs is None:
        return
    if inputs.kernel not in limits.inputs:
        yield (
            f"{target.name} sees inputs rounded to {inputs.name}, for which there is no kernel in "
            "this layout"
        )
    elif limits.inputs_by_channel and scheme.rows == 1 and not _by_channel(scheme):
        yield (
            f"{target.name} has {scheme.bits}-bit weights and inputs rounded to {inputs.name}; "
            "those are multiplied with 8-bit weights by channel"
        )
    elif limits.inputs_by_channel and scheme.symmetry == "asymmetric":
        yield f"{target.name} is asymmetric; beside rounded inputs grids must be symmetric"


def _fused_problems(targets: Sequence[Target]) -> Iterable[str]:
    """An engine stacks fused matrices and keeps one scheme, and one divisor of fp8 scales.

    Only matrices that are rounded together have the same divisor.
    """
    by_name = {target.name: target for target in targets}
    for name in by_name:
        parent, _, leaf = name.rpartition(".")
        for group in _FUSED:
            names = [f"{parent}.{mate}" for mate in group if f"{parent}.{mate}" in by_name]
            if leaf != group[0]:
                continue
            layer, mates = ", ".join(names), [by_name[mate] for mate in names]
            if len({(mate.scheme, mate.activations) for mate in mates}) > 1:
                yield (
                    f"{layer} are one fused layer and must share one scheme; round all of them "
                    "alike, or none"
                )
            elif _divided(mates[0]) and len({mate.rounding for mate in mates}) > 1:
                yield (
                    f"{layer} are one fused layer and must share one divisor of their scales; "
                    "round all of them in one stage"
                )


def _divided(target: Target) -> bool:
    """Whether its scales have a divisor, one for the matrix."""
    return target.scheme is not None and target.scheme.scales == "e4m3"
