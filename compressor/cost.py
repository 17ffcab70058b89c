"""What a step costs: bits and bytes by formula, memory, operations and time by estimate."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import get_args

from compressor import machine, resources
from compressor.evaluation.config import EvaluateConfig
from compressor.evaluation.suites import load_suite
from compressor.formats.capabilities import Container
from compressor.formats.exchange import (
    GGUF_BLOCK,
    GGUF_BLOCK_BYTES,
    repeated_scales,
    stored_bytes,
)
from compressor.formats.gguf_types import GgufType
from compressor.formats.sizes import STORED, Role, bits_per_weight
from compressor.formats.support import LAYOUTS
from compressor.model.architecture import (
    ROOM_BESIDE_PARKED,
    SOLVED_AT_ONCE,
    Architecture,
    held_by_forward,
    moments_held,
    solving_bytes,
)
from compressor.model.matrices import Matrix
from compressor.stages.packing import target_of
from compressor.text import shards
from compressor.types import WeightScheme

_OUTER: Mapping[str, Role] = {"embed": "embeddings", "position": "embeddings", "head": "head"}
_BYTES_PER_TOKEN = 3.5  # of English text and code, for tokenizers of 32k entries and more
_FLOPS_PER_CORE = {False: 4e10, True: 1e11}  # fp32 products without and with AVX-512, in practice
_GRID_CANDIDATES = 80
_PROBE_SECONDS = 0.05


def linear_bits(architecture: Architecture) -> tuple[float, float]:
    """Mean bits of a weight of the blocks' linear layers: codes alone, and with scales."""
    nominal = stored = weights = 0.0
    for matrix in architecture.matrices:
        if matrix.block is None:
            continue
        dense = 8.0 * architecture.dtype_bytes
        own = dense if matrix.scheme is None else float(matrix.scheme.bits)
        full = dense if matrix.scheme is None else _bits(matrix, matrix.scheme, architecture)
        weights += matrix.parameters
        nominal += own * matrix.parameters
        stored += full * matrix.parameters
    return nominal / weights, stored / weights


def _bits(matrix: Matrix, scheme: WeightScheme, architecture: Architecture) -> float:
    return bits_per_weight(matrix.shape, scheme, STORED[architecture.dtype])


def checkpoint_bytes(architecture: Architecture, form: Container = "auto") -> int:
    """Exact bytes of all tensors of an export, file headers excepted."""
    return sum(role_bytes(architecture, form).values())


def role_bytes(architecture: Architecture, form: Container = "auto") -> dict[Role, int]:
    """The same by what the bytes hold, as `formats.sizes.measure` counts them after the fact."""
    found: dict[Role, int] = dict.fromkeys(get_args(Role), 0)
    others = sum(math.prod(shape) for _, shape in architecture.others)
    found["rest"] += others * (4 if form == "gguf" else architecture.dtype_bytes)
    for matrix in architecture.matrices:
        outer = _OUTER.get(matrix.role)
        if matrix.scheme is None:
            found[outer or "rest"] += matrix.parameters * architecture.dtype_bytes
            continue
        target = target_of(matrix, architecture)
        size = stored_bytes(target, STORED[architecture.dtype], form)
        found[outer or "codes"] += size.codes
        found[outer or "scales"] += size.scales
        found[outer or "zero_points"] += size.zero_points
        found[outer or "rest"] += size.shape
        if architecture.tied:
            found["head"] += repeated_scales(target, STORED[architecture.dtype], form)
    if architecture.cache is not None and form in LAYOUTS:
        found["scales"] += 2 * architecture.layers * architecture.dtype_bytes
    return found


def dense_outer(architecture: Architecture) -> list[Matrix]:
    """Embedding and head without codes; one matrix where they are tied."""
    outer = (matrix for matrix in architecture.matrices if matrix.role in _OUTER)
    return [matrix for matrix in outer if matrix.scheme is None]


def embedding_bytes(architecture: Architecture, kind: GgufType | None = None) -> int:
    """Of those: as they are, or in blocks of GGUF."""
    weights = sum(matrix.parameters for matrix in dense_outer(architecture))
    if kind is None:
        return weights * architecture.dtype_bytes
    return weights // GGUF_BLOCK * GGUF_BLOCK_BYTES[kind]


def rounding_flops(
    changed: Sequence[Matrix],
    after: Architecture,
    tokens: int,
    passes: float,
    *,
    reference: bool = False,
) -> float:
    """Operations of a rounding stage.

    Grid search reads every weight once per candidate, about 6 operations each. With text: one
    forward passes of every block, 2·weights·tokens each; one Hessian
    per input group, 2·tokens·in²; its factor, in³ in fp64; and GPTQ itself, 2·out·in² per matrix.
    With the parent run beside (its passes are in `passes`): a second moment per input group, its
    linear system, 2/3·in³ in fp64, and two products per matrix, 2·out·in² each; not for experts.
    """
    weights = sum(matrix.parameters for matrix in changed)
    total = 6.0 * _GRID_CANDIDATES * weights
    if not tokens:
        return total
    block_weights = sum(m.parameters for m in after.matrices if m.block is not None)
    total += 2.0 * block_weights * tokens * passes
    widths = {matrix.input_group: matrix.shape[1] for matrix in changed}
    total += sum(2.0 * tokens * width**2 + 2.0 * width**3 for width in widths.values())
    if reference:
        inner = [matrix for matrix in changed if matrix.block is not None]
        paired = [matrix for matrix in inner if matrix.expert is None]
        widths = {matrix.input_group: matrix.shape[1] for matrix in paired}
        total += sum(2.0 * tokens * width**2 + 2 / 3 * width**3 for width in widths.values())
        total += sum(4.0 * matrix.parameters * matrix.shape[1] for matrix in paired)
    return total + sum(2.0 * matrix.parameters * matrix.shape[1] for matrix in changed)


def block_memory(
    architecture: Architecture,
    tokens: int,
    *,
    reference: bool = False,
    domains: int = 1,
    standing: bool = False,
    activation_bytes: int = 4,
) -> int:
    """Peak memory of a stage that streams blocks, in bytes.

    One block, as stored, in the working precision and once more in fp32 as the rounder's copy; the
    fp32 Hessians of `moments_held` and three fp64 copies of the largest while it is factored, or
    where there are experts, `solving_bytes` of as many as `SOLVED_AT_ONCE` allows; the residual
    stream of all calibration tokens before and after the block. With the parent run
    beside: its block, its residual stream and a second matrix per input group. Where forwards stand
    still in front of each matrix: what they hold, in the parent only where a part of the block
    begins, as far as it is not parked in a file. Where the moments of domains are kept apart, their
    matrices once for every domain and once mixed.

    Args:
        architecture: of the model.
        tokens: of calibration text, 0 for none.
        reference: the parent runs beside.
        domains: whose moments are kept apart.
        standing: forwards stand still (`sequential: sublayer`).
        activation_bytes: size of a number in the working precision.
    """
    parts = domains + 1 if domains > 1 else 1
    streams = 2 if reference else 1
    most = 0
    for index in range(architecture.layers):
        groups = architecture.groups(index)
        weights = sum(matrix.parameters for matrix in architecture.block(index))
        need = weights * (architecture.dtype_bytes + 4 + activation_bytes * streams)
        if tokens:
            widths = [matrices[0].shape[1] for matrices in groups.values()]
            held = moments_held(
                architecture, index, streams=streams, sublayers=standing, parts=parts
            )
            routed = (solving_bytes(one) for one in groups.values() if one[0].expert is not None)
            need += 4 * parts * held + max(24 * max(widths) ** 2, min(sum(routed), SOLVED_AT_ONCE))
        if standing:
            still = _standing_bytes(architecture, index, tokens, activation_bytes)[:streams]
            need += sum(min(size, ROOM_BESIDE_PARKED) for size in still)
        most = max(most, need)
    return most + 2 * activation_bytes * streams * tokens * architecture.hidden


def parked_bytes(
    architecture: Architecture, tokens: int, *, reference: bool, activation_bytes: int
) -> int:
    """Most that forwards which stand still keep in a file; see `block_memory`."""
    streams = 2 if reference else 1
    return max(
        sum(
            max(size - ROOM_BESIDE_PARKED, 0)
            for size in _standing_bytes(architecture, index, tokens, activation_bytes)[:streams]
        )
        for index in range(architecture.layers)
    )


def _standing_bytes(
    architecture: Architecture, index: int, tokens: int, activation_bytes: int
) -> tuple[int, int]:
    """Of the model that is rounded, and of its parent beside it."""
    held = held_by_forward(architecture, index), 3 * architecture.hidden
    return held[0] * tokens * activation_bytes, held[1] * tokens * activation_bytes


def evaluation_memory(config: EvaluateConfig, base: Architecture) -> int:
    """Peak memory of measuring a variant, in bytes.

    Scoring goes by blocks, then holds the head in fp32 with the logits of one batch, twice (base
    and variant). To see that it loads, the model is loaded whole, as stored, if memory holds it.
    """
    window = min(config.length or 512, base.max_positions)
    logits = 2 * 4 * config.batch_size * window * base.vocab
    return max(base.bytes, 4 * base.vocab * base.hidden + logits)


def evaluation_tokens(config: EvaluateConfig) -> int:
    """Tokens of the evaluation text, from its bytes."""
    if config.text:
        return int(
            sum(Path(path).stat().st_size for path in config.text.values()) / _BYTES_PER_TOKEN
        )
    return int(sum(_suite_bytes(config)) / _BYTES_PER_TOKEN)


def _suite_bytes(config: EvaluateConfig) -> Iterator[int]:
    """UTF-8 bytes that each domain of the suite contributes, at most."""
    suite = load_suite(config.suite)
    limit = config.documents or suite.documents
    for shard in shards(resources.evals()):
        if shard.split == "evaluation" and shard.domain in suite.domains:
            documents = min(limit or shard.documents, shard.documents)
            average = shard.bytes / shard.documents
            yield int(documents * min(average, suite.bytes_per_document or average))


def flops_per_second() -> tuple[float, str]:
    """Speed of an fp32 matrix product, and how it is known.

    Measured for 50 ms when torch is loaded already; else a nominal rate per core, because
    loading torch takes longer than the plan.
    """
    if "torch" in sys.modules:
        return _measured_rate()
    count, wide = machine.cores(), "avx512f" in machine.cpu_flags()
    return count * _FLOPS_PER_CORE[wide], f"nominal for {count} cores"


@cache
def _measured_rate() -> tuple[float, str]:
    """Measured once, so that plans of one process compare."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    matrix = torch.ones(512, 512, device=device)
    (matrix @ matrix)[0, 0].item()  # the first product also starts threads or kernels
    began, products = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - began) < _PROBE_SECONDS:
        (matrix @ matrix)[0, 0].item()  # waits for the device
        products += 1
    return 2 * 512**3 * products / elapsed, f"measured on {device}"
