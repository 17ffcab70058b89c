"""What can be exported, and what loads it: rules on data, so that the plan refuses before work.

Compressed-tensors, measured with transformers 5.23 and compressed-tensors 0.20 by reloading tiny
models
(`tests/formats/test_compressed_tensors.py` repeats it):

- Symmetric and full-range codes of 2 to 8 bits, by group or channel, mixed freely: load as is.
- Asymmetric *pack-quantized*: the packed zero-points do not fit the placeholder that the library
  makes, and loading fails, unless the configuration says `dequantize`; that route reads one
  scheme for all matrices. *int-quantized* zero-points are not packed and load as is.
- Quantized embeddings: likewise only through `dequantize`, tied or not.
- Experts of a mixture: packed per expert under their names on disk, symmetric, one scheme for
  all; once anything is quantized, dense experts do not load, nor do int-quantized ones.
- GPT-2's Conv1D stores [in, out], so groups along the last dimension run over outputs: refused.

The other containers have their rules in `exchange`; what engines load is in `capabilities`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from compressor.formats.capabilities import ENGINES, Container, Limits
from compressor.types import WeightScheme

Format = Literal["pack-quantized", "int-quantized"]
Kind = Literal["linear", "head", "embedding", "expert", "router", "conv1d"]
FORMATS: tuple[Format, ...] = ("pack-quantized", "int-quantized")


@dataclass(frozen=True)
class Target:
    """A matrix as the export sees it.

    Attributes:
        name: on disk, without `.weight`.
        shape: [out, in].
        kind: `head` is an untied output head; a tied one is part of the `embedding`.
        scheme: None when the matrix stays dense.
    """

    name: str
    shape: tuple[int, int]
    kind: Kind
    scheme: WeightScheme | None


_FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("w1", "w3"))


def needs_dequantize(schemes: Iterable[WeightScheme], embeddings: bool, form: Format) -> bool:
    """Whether transformers loads the export only with `dequantize` in its configuration."""
    asymmetric = any(scheme.symmetry == "asymmetric" for scheme in schemes)
    return embeddings or (asymmetric and form == "pack-quantized")


def export_problems(targets: Sequence[Target], form: Format = "pack-quantized") -> list[str]:
    """Why these matrices cannot be exported to `form` so that transformers loads them.

    Returns:
        One sentence per broken rule; empty when the export will load.
    """
    quantized = [target for target in targets if target.scheme is not None]
    problems = [sentence for target in quantized for sentence in _matrix_problems(target, form)]
    problems += _expert_problems(targets, form)
    schemes = {target.scheme for target in quantized if target.scheme is not None}
    embeddings = any(target.kind == "embedding" for target in quantized)
    if len(schemes) > 1 and needs_dequantize(schemes, embeddings, form):
        cause = "quantized embeddings load" if embeddings else "asymmetric packed weights load"
        problems.append(
            f"{cause} in transformers only when every quantized matrix has one scheme, "
            f"and here there are {len(schemes)}"
        )
    return problems


def _matrix_problems(target: Target, form: Format) -> Iterable[str]:
    assert target.scheme is not None
    scheme, (out, in_features) = target.scheme, target.shape
    if target.kind == "conv1d":
        yield (
            f"{target.name} is a Conv1D stored as [in, out], and compressed-tensors groups "
            "along the last dimension, which there is the output"
        )
    if target.kind == "router":
        yield f"{target.name} is a router, which compressed-tensors cannot hold"
    if not 2 <= scheme.bits <= 8:
        yield f"{target.name} has {scheme.bits}-bit codes; compressed-tensors packs 2 to 8"
    if scheme.group_size is not None and in_features % scheme.group_size:
        yield f"{target.name} has {in_features} inputs, not a multiple of {scheme.group_size}"
    if scheme.bits == 4 and scheme.symmetry == "asymmetric" and out <= 8:
        # One packed word per column: compressed-tensors 0.20 fails to view it as bytes.
        yield f"{target.name} has {out} outputs; 4-bit zero-points unpack only from 9 up"
    if form == "int-quantized" and (scheme.bits != 8 or scheme.group_size is not None):
        yield f"{target.name}: int-quantized holds 8-bit codes with one scale per output channel"


def _expert_problems(targets: Sequence[Target], form: Format) -> Iterable[str]:
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


def engine_problems(engine: str, targets: Sequence[Target], form: Container) -> list[str]:
    """Why `engine` (a key of `ENGINES`) would not load this export; one sentence per rule."""
    loads = ENGINES[engine].containers
    if form not in loads:
        return [f"{engine} does not load {form}; it loads {', '.join(loads)}"]
    limits = loads[form]
    problems = [] if limits.mixed_fused else [f"{engine}: {s}" for s in _fused_problems(targets)]
    for target in targets:
        if target.scheme is not None:
            problems += [f"{engine}: {s}" for s in _limit_problems(limits, target, target.scheme)]
    return problems


def _limit_problems(limits: Limits, target: Target, scheme: WeightScheme) -> Iterable[str]:
    if target.kind == "embedding" and not limits.embeddings:
        yield f"{target.name} is a quantized embedding, which it does not load"
    if scheme.bits not in limits.bits:
        widths = ", ".join(str(bits) for bits in sorted(limits.bits))
        yield f"{target.name} has {scheme.bits}-bit codes; it loads {widths}"
    if scheme.symmetry not in limits.symmetries:
        yield f"{target.name} is {scheme.symmetry}, which it does not load"
    if any(size % limits.multiple for size in target.shape):
        yield f"{target.name} is {list(target.shape)}; sizes must be multiples of {limits.multiple}"
    if scheme.group_size is not None and scheme.group_size % limits.group_multiple:
        yield (
            f"{target.name} has groups of {scheme.group_size}; "
            f"they must be multiples of {limits.group_multiple}"
        )


def _fused_problems(targets: Sequence[Target]) -> Iterable[str]:
    schemes = {target.name: target.scheme for target in targets}
    for name in schemes:
        parent, _, leaf = name.rpartition(".")
        for group in _FUSED:
            mates = [f"{parent}.{mate}" for mate in group if f"{parent}.{mate}" in schemes]
            if leaf == group[0] and len({schemes[mate] for mate in mates}) > 1:
                yield f"{', '.join(mates)} are one fused layer and must share one scheme"
