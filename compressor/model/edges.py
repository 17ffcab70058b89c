"""Where a scale can move from the inputs of matrices into what produces these inputs.

An edge is a producer (the weight of a norm, or rows of a matrix) and all the matrices that read
what it produces. Dividing the producer by s and multiplying the readers' columns by s changes
nothing if everything between is linear in each channel, or homogeneous as ReLU is. What norm
stands where, and how fused matrices lay out their rows, is data below, as in
`compressor.model.families`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from compressor.model.architecture import Architecture
from compressor.model.matrices import Matrix

EdgeKind = Literal["norm_attention", "value_output", "norm_mlp", "up_down"]
EDGE_KINDS: tuple[EdgeKind, ...] = get_args(EdgeKind)
NORM_EDGES: tuple[EdgeKind, ...] = ("norm_attention", "norm_mlp")

_PRE = ("input_layernorm", "post_attention_layernorm")
_GEMMA = ("input_layernorm", "pre_feedforward_layernorm")
_NORMS_BEFORE: Mapping[str, tuple[str, str] | None] = {
    "llama": _PRE,
    "mistral": _PRE,
    "qwen2": _PRE,
    "qwen3": _PRE,
    "phi3": _PRE,
    "smollm3": _PRE,
    "granite": _PRE,
    "mixtral": _PRE,
    "qwen3_moe": _PRE,
    "gpt_neox": _PRE,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "opt": ("self_attn_layer_norm", "final_layer_norm"),
    "gpt2": ("ln_1", "ln_2"),
    "olmo2": None,
}
"""The norms in front of attention and of the feed-forward half; None where there are none."""

_READERS: Mapping[str, tuple[str, ...]] = {
    "norm_attention": ("q", "k", "v", "qkv"),
    "norm_mlp": ("gate", "up", "gate_up", "fc_in"),
}

_NORM_OFFSET: Mapping[str, float] = {"gemma2": 1.0, "gemma3_text": 1.0}
"""What a norm adds to its stored weight."""


@dataclass(frozen=True)
class Rows:
    """Rows of a matrix: `runs` runs of `length`, the first at `start`, `step` apart."""

    start: int
    length: int
    runs: int = 1
    step: int = 0

    def indices(self) -> list[int]:
        """Row numbers in order."""
        starts = (self.start + run * self.step for run in range(self.runs))
        return [row for start in starts for row in range(start, start + self.length)]


@dataclass(frozen=True)
class Edge:
    """One place to scale.

    Attributes:
        kind: which of the four of a block.
        source: name on disk of the producer, without `.weight`.
        rows: rows of the producing matrix, one per channel; None when the producer is a norm.
        transposed: the producing matrix is stored [in, out].
        offset: what the norm adds to its stored weight.
        readers: matrices that read the channels and are rounded later.
        followers: matrices that read them too and stay dense (routers).
        parent: path below the block, in the module tree, of the module whose output an error in
            the readers reaches first; None where that is their own output.
        heads: (key-value heads, query heads that share one), when the readers have a channel per
            query head and the producer one per key-value head.
        group: input group of the readers.
        name: of the parent or of the only reader, for reports.
    """

    kind: EdgeKind
    source: str
    rows: Rows | None
    transposed: bool
    offset: float
    readers: tuple[Matrix, ...]
    followers: tuple[Matrix, ...]
    parent: str | None
    heads: tuple[int, int] | None
    group: str
    name: str


def edges(architecture: Architecture, block: int) -> Iterator[Edge]:
    """All edges of a block, in execution order; several of one kind where there are experts."""
    by_role: dict[str, list[Matrix]] = {}
    for matrix in architecture.block(block):
        by_role.setdefault(matrix.role, []).append(matrix)
    for kind in EDGE_KINDS:
        if missing(architecture, kind):
            continue
        if kind in NORM_EDGES:
            yield _norm_edge(architecture, kind, block, by_role)
        elif kind == "value_output":
            yield _value_edge(architecture, by_role)
        else:
            yield from _up_edges(architecture, by_role)


def missing(architecture: Architecture, kind: EdgeKind) -> str:
    """Why the family has no edge of this kind; empty when it has."""
    family = architecture.family
    if architecture.model_type not in _NORMS_BEFORE:
        return f"it is not known what can be scaled in {family} models"
    if kind in NORM_EDGES:
        return _missing_norm(architecture, kind)
    activation = _activation(architecture)
    plain = any(matrix.role == "fc_in" for matrix in architecture.block(0))
    if kind == "up_down" and plain and activation != "relu":
        return (
            f"between the two feed-forward matrices of this {family} model stands "
            f"{activation}, which no scale passes through"
        )
    return ""


def _missing_norm(architecture: Architecture, kind: EdgeKind) -> str:
    """Why there is no norm, or none with a weight, in front of a half."""
    family, norms = architecture.family, _NORMS_BEFORE[architecture.model_type]
    if norms is None or (architecture.model_type == "opt" and not architecture.prenorm):
        return f"this {family} model has its norms behind the halves of a block, none before"
    first = f"{architecture.blocks_path}.0.{norms[NORM_EDGES.index(kind)]}.weight"
    if first not in dict(architecture.others):
        return f"the norms of this {family} model have no weight to fold into"
    return ""


def _activation(architecture: Architecture) -> str:
    """Name of the function between fc_in and fc_out."""
    config = architecture.config
    default = "relu" if architecture.model_type == "opt" else "gelu"
    keys = ("activation_function", "hidden_act")
    return str(next((config[key] for key in keys if config.get(key)), default))


def _norm_edge(
    architecture: Architecture,
    kind: EdgeKind,
    block: int,
    by_role: Mapping[str, list[Matrix]],
) -> Edge:
    norms = _NORMS_BEFORE[architecture.model_type]
    assert norms is not None  # missing() says so
    roles = (
        ("q", "k", "v", "qkv") if kind == "norm_attention" else ("gate", "up", "gate_up", "fc_in")
    )
    readers = tuple(matrix for role in roles for matrix in by_role.get(role, ()))
    followers = () if kind == "norm_attention" else tuple(by_role.get("router", ()))
    prefix = f"{architecture.blocks_path}.{block}."
    path = architecture.module_tensor(readers[0].name).removeprefix(prefix)
    parent = path.partition(".")[0] if "." in path else None
    return Edge(
        kind=kind,
        source=f"{prefix}{norms[NORM_EDGES.index(kind)]}",
        rows=None,
        transposed=False,
        offset=_NORM_OFFSET.get(architecture.model_type, 0.0),
        readers=readers,
        followers=followers,
        parent=parent,
        heads=None,
        group=(followers or readers)[0].input_group,
        name=f"{prefix}{parent}" if parent else readers[0].name,
    )


def _value_edge(architecture: Architecture, by_role: Mapping[str, list[Matrix]]) -> Edge:
    """v → o; attention mixes tokens and heads' weights, never the channels of a value."""
    source = by_role["v" if "v" in by_role else "qkv"][0]
    reader = by_role["o"][0]
    share = architecture.heads // architecture.kv_heads
    heads = (architecture.kv_heads, share) if share > 1 else None
    return _matrix_edge("value_output", source, _value_rows(architecture, source), reader, heads)


def _value_rows(architecture: Architecture, source: Matrix) -> Rows:
    """Rows of a matrix that make values: all of v, the last third of qkv, or a third per head."""
    width = architecture.kv_heads * architecture.head_dim
    if source.role == "v":
        return Rows(0, width)
    if architecture.model_type == "gpt_neox":
        head = architecture.head_dim
        return Rows(2 * head, head, architecture.heads, 3 * head)
    return Rows(source.shape[0] - width, width)


def _up_edges(architecture: Architecture, by_role: Mapping[str, list[Matrix]]) -> Iterator[Edge]:
    """up → down (never gate → down: an activation function stands between), per expert."""
    for role in ("up", "gate_up", "fc_in"):
        pairs = zip(by_role.get(role, ()), by_role.get("down") or by_role["fc_out"], strict=False)
        for source, reader in pairs:
            width = reader.shape[1]
            rows = Rows(source.shape[0] - width, width)
            yield _matrix_edge("up_down", source, rows, reader, None)


def _matrix_edge(
    kind: EdgeKind, source: Matrix, rows: Rows, reader: Matrix, heads: tuple[int, int] | None
) -> Edge:
    return Edge(
        kind=kind,
        source=source.name,
        rows=rows,
        transposed=source.transposed_on_disk,
        offset=0.0,
        readers=(reader,),
        followers=(),
        parent=None,
        heads=heads,
        group=reader.input_group,
        name=reader.name,
    )
