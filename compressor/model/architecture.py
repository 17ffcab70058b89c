"""From `config.json` to every tensor: names on disk, shapes, roles, and who shares an input.

Nothing here reads a weight or imports torch, so that a plan can be made, and refused, in
milliseconds. What a family looks like is data, in `compressor.model.families`.
"""

from __future__ import annotations

import difflib
import fnmatch
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from compressor.errors import ModelError
from compressor.model.families import FAMILIES, Condition, Family, Linear, Norm, NormKind
from compressor.types import (
    ACTIVATIONS,
    ActivationScheme,
    CacheScheme,
    WeightScheme,
    activation_scheme,
)

DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}

ROLE_SETS: Mapping[str, tuple[str, ...]] = {
    "attention": ("q", "k", "v", "qkv", "o"),
    "mlp": ("gate", "up", "gate_up", "down", "fc_in", "fc_out"),
}
"""Pattern words that stand for several roles; `linear` and `all` are built from them."""

Kind = Literal["linear", "head", "embedding", "expert", "router", "conv1d"]

SERVING = "compressor"
"""Key of `config.json` for what happens while the model runs, which weights cannot show."""

_KINDS: Mapping[str, Kind] = {"head": "head", "embed": "embedding", "router": "router"}
_KEY_PROJECTIONS = ("k_proj", "qkv_proj")
_NOT_IN_ALL = ("router", "position")
_READERS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "fc_in", "router")


@dataclass(frozen=True)
class Matrix:
    """One weight matrix.

    Attributes:
        name: of the tensor on disk, without `.weight`.
        shape: (out, in), whichever way round it is stored.
        role: `q`, `k`, `v`, `qkv`, `o`, `gate`, `up`, `gate_up`, `down`, `fc_in`, `fc_out`,
            `router`, `embed`, `position`, `project_in`, `project_out`, `head`.
        block: index of its block; None outside the blocks.
        input_group: matrices with the same group see the same input, hence share one Hessian.
        scheme: the integer grid that a plan has assigned; None while dense.
        activations: how its inputs are rounded while the model runs; None when they are not.
        allotted: the grid that a rounder is to use in place of its own; None leaves it the choice.
        expert: index of its expert in a mixture of experts.
        transposed_on_disk: stored [in, out].
    """

    name: str
    shape: tuple[int, int]
    role: str
    block: int | None
    input_group: str
    scheme: WeightScheme | None = None
    activations: ActivationScheme | None = None
    allotted: WeightScheme | None = None
    expert: int | None = None
    transposed_on_disk: bool = False

    @property
    def tensor(self) -> str:
        """Name of the tensor on disk."""
        return f"{self.name}.weight"

    @property
    def disk_shape(self) -> tuple[int, int]:
        """Shape of the tensor on disk."""
        out, in_ = self.shape
        return (in_, out) if self.transposed_on_disk else (out, in_)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.shape[0] * self.shape[1]

    @property
    def kind(self) -> Kind:
        """What it is to whoever packs it."""
        if self.transposed_on_disk:
            return "conv1d"
        if self.role in _KINDS:
            return _KINDS[self.role]
        return "linear" if self.expert is None else "expert"


@dataclass(frozen=True)
class Unmatched:
    """A pattern that selected nothing, and what may have been meant (or "")."""

    pattern: str
    suggestion: str


@dataclass(frozen=True)
class Selection:
    """What patterns selected: matrices in model order, and the patterns that selected none."""

    matrices: tuple[Matrix, ...]
    unmatched: tuple[Unmatched, ...]


@dataclass(frozen=True)
class Architecture:
    """A model as its configuration describes it; frozen, so that stages map one to the next.

    Build it with `from_config`. `matrices` are in the order in which a forward pass uses
    them; `others` (norms, biases) are (name, shape) pairs.
    """

    model_type: str
    config: Mapping[str, object] = field(repr=False, compare=False)
    matrices: tuple[Matrix, ...] = field(repr=False)
    others: tuple[tuple[str, tuple[int, ...]], ...] = field(repr=False)
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    tied: bool
    dtype: str
    experts: int
    experts_per_token: int
    expert_intermediate: int
    sliding_window: int | None
    prenorm: bool
    logits_softcap: float | None
    logits_divisor: float
    cache: CacheScheme | None = None

    @classmethod
    def from_config(cls, config: Mapping[str, object]) -> Architecture:
        """Derive everything from the content of a `config.json`.

        Keys that the file leaves out take the defaults of the family's configuration class.

        Raises:
            ModelError: the family is unknown, not a plain causal language model, or a number
                is missing or senseless.
        """
        architecture = _Builder(config).build()
        cache = _rounded_cache(config, architecture.layers)
        return replace(architecture, cache=cache).with_activations(_rounded_inputs(config))

    @property
    def family(self) -> str:
        """Name of the family, for people."""
        return self._row.name

    @property
    def _row(self) -> Family:
        return FAMILIES[self.model_type]

    @property
    def norm(self) -> NormKind:
        """What the norms over the residual stream compute."""
        return self._row.norm

    def norm_readers(self, index: int) -> Mapping[str, tuple[Matrix, ...]]:
        """By the norm of a pre-norm block: the matrices that read what it puts out.

        Keys are tensor names on disk. The first norm stands before attention, the second before
        the feed-forward half, whose router and experts all read it.
        """
        prefix = f"{self.blocks_path}.{index}."
        attention, mlp = (f"{prefix}{norm.path}.weight" for norm in self._row.norms[:2])
        readers = [matrix for matrix in self.block(index) if matrix.role in _READERS]
        first = tuple(matrix for matrix in readers if matrix.role in ROLE_SETS["attention"])
        return {attention: first, mlp: tuple(m for m in readers if m not in first)}

    @property
    def final_norm(self) -> str:
        """Name on disk of the weight of the norm before the head."""
        return f"{self._row.final[-1].path}.weight"

    def value_rows(self, matrix: Matrix) -> slice | None:
        """Rows of a matrix that compute values, head after head; None when it computes none.

        None also for a fused matrix in which queries, keys and values of a head stand together.
        """
        if matrix.role == "v":
            return slice(0, matrix.shape[0])
        if matrix.role != "qkv" or self._row.interleaved:
            return None
        return slice(matrix.shape[0] - self.kv_heads * self.head_dim, matrix.shape[0])

    @property
    def blocks_path(self) -> str:
        """Path of the list of blocks, on disk and in the module tree."""
        return self._row.blocks

    @property
    def quantized(self) -> bool:
        """Whether the configuration says that the weights are already compressed."""
        return bool(self.config.get("quantization_config"))

    @cached_property
    def _by_name(self) -> Mapping[str, Matrix]:
        return {matrix.name: matrix for matrix in self.matrices}

    def matrix(self, name: str) -> Matrix:
        """The matrix of that name (without `.weight`).

        Raises:
            ModelError: there is none.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise ModelError(
                f"the model has no matrix {name!r}", _did_you_mean(name, self._by_name)
            ) from None

    def block(self, index: int) -> tuple[Matrix, ...]:
        """Matrices of one block, in execution order."""
        return tuple(matrix for matrix in self.matrices if matrix.block == index)

    def groups(self, index: int) -> Mapping[str, tuple[Matrix, ...]]:
        """Matrices of one block by input group, groups in execution order."""
        found: dict[str, tuple[Matrix, ...]] = {}
        for matrix in self.block(index):
            found[matrix.input_group] = (*found.get(matrix.input_group, ()), matrix)
        return found

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of every tensor on disk; what is tied appears once."""
        for matrix in self.matrices:
            yield matrix.tensor, matrix.disk_shape
        yield from self.others

    @property
    def parameters(self) -> int:
        """Number of parameters, ties counted once."""
        return sum(_product(shape) for _, shape in self.tensors())

    @property
    def bytes(self) -> int:
        """Bytes of all tensors in the configuration's dtype, as if dense; no file headers."""
        return self.parameters * self.dtype_bytes

    @property
    def dtype_bytes(self) -> int:
        """Bytes of one dense weight."""
        return DTYPE_BYTES[self.dtype]

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes that one more token of context adds to the key-value cache."""
        size = self.dtype_bytes if self.cache is None else self.cache.bits // 8
        return 2 * self.layers * self.kv_heads * self.head_dim * size

    @property
    def cached_attention(self) -> tuple[str, ...]:
        """By block, the path of its attention on disk; empty where its cache cannot be rounded.

        compressed-tensors knows attention by what it projects with: `k_proj` or `qkv_proj`.
        """
        keys = [m.name.rpartition(".") for m in self.matrices if m.role in ("k", "qkv")]
        if any(leaf not in _KEY_PROJECTIONS for _, _, leaf in keys):
            return ()
        return tuple(parent for parent, _, _ in keys)

    def with_cache(self, scheme: CacheScheme) -> Architecture:
        """The same model with keys and values rounded where they enter the cache."""
        return replace(self, cache=scheme)

    def module_tensor(self, tensor: str) -> str:
        """Name in the module tree of a tensor on disk (experts excepted: they are fused)."""
        for on_disk, in_modules in self._row.renames:
            tensor = tensor.replace(on_disk, in_modules)
        return tensor

    def with_scheme(self, names: Iterable[str], scheme: WeightScheme | None) -> Architecture:
        """The same model with a grid assigned to the matrices of these names.

        Raises:
            ModelError: a name belongs to no matrix.
        """
        chosen = {self.matrix(name).name for name in names}
        matrices = (
            replace(matrix, scheme=scheme) if matrix.name in chosen else matrix
            for matrix in self.matrices
        )
        return replace(self, matrices=tuple(matrices))

    def with_activations(self, schemes: Mapping[str, ActivationScheme]) -> Architecture:
        """The same model with the inputs of the matrices of these names rounded; others as before.

        Raises:
            ModelError: a name belongs to no matrix.
        """
        chosen = {self.matrix(name).name: scheme for name, scheme in schemes.items()}
        matrices = (
            replace(matrix, activations=chosen[matrix.name]) if matrix.name in chosen else matrix
            for matrix in self.matrices
        )
        return replace(self, matrices=tuple(matrices))

    def with_allotment(self, schemes: Mapping[str, WeightScheme]) -> Architecture:
        """The same model with the grids that a rounder is to use, by the name of the matrix.

        Raises:
            ModelError: a name belongs to no matrix.
        """
        chosen = {self.matrix(name).name: scheme for name, scheme in schemes.items()}
        matrices = (
            replace(matrix, allotted=chosen[matrix.name]) if matrix.name in chosen else matrix
            for matrix in self.matrices
        )
        return replace(self, matrices=tuple(matrices))

    @property
    def activations(self) -> Mapping[str, ActivationScheme]:
        """By name, how the inputs of matrices are rounded; those that are not are left out."""
        return {m.name: m.activations for m in self.matrices if m.activations is not None}

    def with_config(self, **changes: object) -> Architecture:
        """The model after its configuration changed; grids stay with the names that remain."""
        aliases = self._row.aliases
        renamed = {aliases.get(key, key): value for key, value in changes.items()}
        changed = Architecture.from_config({**self.config, **renamed})
        old = self._by_name
        matrices = (
            replace(
                matrix,
                scheme=old[matrix.name].scheme,
                activations=old[matrix.name].activations,
            )
            if matrix.name in old
            else matrix
            for matrix in changed.matrices
        )
        return replace(changed, matrices=tuple(matrices), cache=self.cache)

    def select(self, patterns: Iterable[str]) -> Selection:
        """Matrices that any of the patterns matches.

        A pattern is a role (`q`, `down`, …), `attention`, `mlp`, `linear` (all matrices of
        blocks but routers), `all` (every matrix but routers and position tables), a glob over
        names (`model.layers.0.*`), or `re:` and a regular expression matched from the start
        of a name.
        """
        chosen: set[str] = set()
        unmatched = []
        for pattern in patterns:
            names, suggestion = self._match(pattern)
            chosen |= names
            if not names:
                unmatched.append(Unmatched(pattern, suggestion))
        return Selection(
            tuple(matrix for matrix in self.matrices if matrix.name in chosen), tuple(unmatched)
        )

    def _match(self, pattern: str) -> tuple[set[str], str]:
        """Names that one pattern selects; if none, a suggestion."""
        if pattern.startswith("re:"):
            try:
                expression = re.compile(pattern[3:])
            except re.error as error:
                return set(), f"not a regular expression: {error}"
            return {name for name in self._by_name if expression.match(name)}, ""
        names = {matrix.name for matrix in self.matrices if _plays(matrix, pattern)}
        names |= set(fnmatch.filter(self._by_name, pattern))
        return names, "" if names else self._suggest(pattern)

    def _suggest(self, pattern: str) -> str:
        if pattern == "head" and self.tied:
            return "the head is tied to the embedding and has no matrix of its own; untie it first"
        words = {"linear", "all", *ROLE_SETS, *(matrix.role for matrix in self.matrices)}
        return _did_you_mean(pattern, (*words, *self._by_name)) or (
            f"roles of this model: {', '.join(sorted(words))}"
        )


def serving_config(
    config: Mapping[str, object], activations: Mapping[str, ActivationScheme]
) -> dict[str, object]:
    """The configuration of a model whose inputs are rounded like this, and like that so far."""
    every = {**_rounded_inputs(config), **activations}
    if not every:
        return dict(config)
    by_name: dict[str, list[str]] = {}
    for module in sorted(every):
        by_name.setdefault(every[module].name, []).append(module)
    return _served(config, activations=by_name)


def cache_config(config: Mapping[str, object], cache: CacheScheme) -> dict[str, object]:
    """The configuration of a model that rounds keys and values like this."""
    scales = [list(pair) for pair in cache.scales]
    return _served(config, cache={"format": cache.name, "scales": scales})


def _served(config: Mapping[str, object], **facts: object) -> dict[str, object]:
    serving = config.get(SERVING, {})
    known = serving if isinstance(serving, Mapping) else {}
    return {**config, SERVING: {**known, **facts}}


def _rounded_cache(config: Mapping[str, object], layers: int) -> CacheScheme | None:
    """What `cache_config` wrote.

    Raises:
        ModelError: it is something else, or a scale is no positive number.
    """
    serving = config.get(SERVING, {})
    found = serving.get("cache") if isinstance(serving, Mapping) else None
    if found is None:
        return None
    scales = found.get("scales") if isinstance(found, Mapping) else None
    if not isinstance(scales, list) or found.get("format") != CacheScheme.name:
        raise ModelError(f"config.json has {found!r} as the rounding of the cache; known is: fp8")
    pairs = [pair for pair in scales if isinstance(pair, list) and len(pair) == 2]
    if not len(pairs) == len(scales) == layers:
        raise ModelError(f"config.json has {len(scales)} scales of the cache for {layers} blocks")
    for index, pair in enumerate(pairs):
        if not all(isinstance(scale, int | float) and 0 < scale < math.inf for scale in pair):
            raise ModelError(f"config.json: the scales {pair} of block {index}'s cache are no use")
    return CacheScheme(tuple((float(keys), float(values)) for keys, values in pairs))


def _rounded_inputs(config: Mapping[str, object]) -> dict[str, ActivationScheme]:
    """What `serving_config` wrote.

    Raises:
        ModelError: it is something else.
    """
    serving = config.get(SERVING, {})
    found = serving.get("activations", {}) if isinstance(serving, Mapping) else None
    names = found if isinstance(found, Mapping) else {"": ()}
    schemes = {name: activation_scheme(name) for name in names}
    if not all(schemes.values()):
        raise ModelError(
            f"config.json has {found!r} as the rounding of inputs; "
            f"known are: {', '.join(ACTIVATIONS)} and llm-int8 with a threshold"
        )
    return {module: scheme for name, scheme in schemes.items() if scheme for module in names[name]}


def attention_implementation(config: Mapping[str, object]) -> str:
    """`eager` where transformers has no fused attention for the family, else `sdpa`."""
    row = FAMILIES.get(str(config.get("model_type")))
    capped = config.get("attn_logit_softcapping") or (row is not None and row.eager)
    return "eager" if capped else "sdpa"


def _plays(matrix: Matrix, word: str) -> bool:
    """Whether a role word covers the matrix."""
    if word == "all":
        return matrix.role not in _NOT_IN_ALL
    if word == "linear":
        return matrix.block is not None and matrix.role != "router"
    return matrix.role == word or matrix.role in ROLE_SETS.get(word, ())


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""


def _product(shape: Iterable[int]) -> int:
    result = 1
    for size in shape:
        result *= size
    return result


class _Builder:
    """Reads one configuration against its row of the table."""

    def __init__(self, config: Mapping[str, object]) -> None:
        self.config = config
        self.model_type = _known_type(config)
        self.row = FAMILIES[self.model_type]
        self.layers = self.integer("num_hidden_layers")
        self.hidden = self.integer("hidden_size")
        self.heads = self.integer("num_attention_heads")
        self.kv_heads = self.heads
        if self.row.grouped_heads:
            self.kv_heads = self.integer("num_key_value_heads", self.heads)
        self.head_dim = self.integer("head_dim", self.hidden // self.heads)
        self.intermediate = self.integer("intermediate_size", 4 * self.hidden)
        self.vocab = self.integer("vocab_size")
        self.positions = self.integer("max_position_embeddings")
        self.experts = self._experts()
        self.expert_intermediate = self.integer("moe_intermediate_size", self.intermediate)
        self.tied = bool(self.value("tie_word_embeddings"))
        self.flags = self._flags()
        self.widths = self._widths()

    def value(self, key: str) -> object:
        """A configuration value under the family's own name for it, or the family's default."""
        value = self.config.get(self.row.aliases.get(key, key))
        return self.row.defaults.get(key) if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer; `default` where neither file nor family has one."""
        value = self.value(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(
                f"config.json of a {self.row.name} model: {key!r} must be a positive integer,"
                f" not {value!r}"
            )
        return value

    def _experts(self) -> int:
        """Number of experts, under either of the two names in use."""
        if not self.row.experts:
            return 0
        for key in ("num_local_experts", "num_experts"):
            if self.config.get(key) is not None:
                return self.integer(key)
        return self.integer(
            "num_experts" if "num_experts" in self.row.defaults else "num_local_experts"
        )

    def _flags(self) -> Mapping[str, bool]:
        """Conditions that are not a configuration key themselves."""
        before = self.value("do_layer_norm_before") is not False
        return {
            "before": before,
            "final_norm": before
            and not self.config.get("_remove_final_layer_norm")
            and bool(self.value("layer_norm_elementwise_affine")),
            "embed_projected": self._embed_dim() != self.hidden,
        }

    def _embed_dim(self) -> int:
        return self.integer("word_embed_proj_dim", self.hidden)

    def _widths(self) -> Mapping[str, int]:
        query, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        return {
            "hidden": self.hidden,
            "query": query,
            "kv": kv,
            "qkv": query + 2 * kv,
            "head_dim": self.head_dim,
            "intermediate": self.intermediate,
            "gate_up": 2 * self.intermediate,
            "experts": self.experts,
            "expert_intermediate": self.expert_intermediate,
            "vocab": self.vocab,
            "embed_dim": self._embed_dim(),
            # OPT keeps two rows in front of the first position.
            "positions": self.positions + (2 if self.model_type == "opt" else 0),
        }

    def holds(self, condition: Condition) -> bool:
        """Resolve a condition of the table."""
        if isinstance(condition, bool):
            return condition
        return self.flags[condition] if condition in self.flags else bool(self.value(condition))

    def sparse(self, block: int) -> bool:
        """Whether the block has experts instead of a dense feed-forward half."""
        dense = self.config.get("mlp_only_layers") or ()
        if not self.experts or (isinstance(dense, (list, tuple)) and block in dense):
            return False
        return (block + 1) % self.integer("decoder_sparse_step", 1) == 0

    def build(self) -> Architecture:
        matrices, others = self._tables("before"), []
        for index in range(self.layers):
            found, extra = self._block(index)
            matrices += found
            others += extra
        others += self._norms(self.row.final, "")
        matrices += self._tables("after")
        return self._describe(tuple(matrices), tuple(others))

    def _describe(
        self, matrices: tuple[Matrix, ...], others: tuple[tuple[str, tuple[int, ...]], ...]
    ) -> Architecture:
        softcap = self.value("final_logit_softcapping")
        return Architecture(
            model_type=self.model_type,
            config=self.config,
            matrices=matrices,
            others=others,
            layers=self.layers,
            hidden=self.hidden,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            intermediate=self.intermediate,
            vocab=self.vocab,
            max_positions=self.positions,
            tied=self.tied,
            dtype=self._dtype(),
            experts=self.experts,
            experts_per_token=self.integer("num_experts_per_tok", 1) if self.experts else 0,
            expert_intermediate=self.expert_intermediate if self.experts else 0,
            sliding_window=self._sliding_window(),
            prenorm=self.row.prenorm and self.flags["before"],
            logits_softcap=float(softcap) if isinstance(softcap, (int, float)) else None,
            logits_divisor=self._divisor(),
        )

    def _dtype(self) -> str:
        value = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise ModelError(
                f"config.json has dtype {name!r}; weights must be {', '.join(sorted(DTYPE_BYTES))}"
            )
        return name

    def _sliding_window(self) -> int | None:
        if self.value("use_sliding_window") is False:
            return None
        key = "sliding_window"
        explicit = key in self.config
        value = self.config[key] if explicit else self.row.defaults.get(key)
        return value if isinstance(value, int) else None

    def _divisor(self) -> float:
        value = self.config.get("logits_scaling") if self.model_type == "granite" else None
        return float(value) if isinstance(value, (int, float)) else 1.0

    def _tables(self, side: str) -> list[Matrix]:
        """Matrices outside the blocks that are used before or after them."""
        after = [table for table in self.row.outer if table.role == "project_out"]
        before = [table for table in self.row.outer if table not in after]
        found = [
            self._outer(table.role, table.path, table.out, table.in_)
            for table in (before if side == "before" else after)
            if self.holds(table.when)
        ]
        if side == "after" and not self.tied:
            found.append(self._outer("head", self.row.head, "vocab", self.row.head_in))
        return found

    def _outer(self, role: str, path: str, out: str, in_: str) -> Matrix:
        return Matrix(path, (self.widths[out], self.widths[in_]), role, None, path)

    def _block(self, index: int) -> tuple[list[Matrix], list[tuple[str, tuple[int, ...]]]]:
        prefix = f"{self.row.blocks}.{index}."
        mlp = self.row.experts if self.sparse(index) else self.row.mlp
        linears = [item for item in self.row.attention if isinstance(item, Linear)]
        norms = [item for item in self.row.attention if isinstance(item, Norm)]
        matrices, others = [], self._norms((*self.row.norms, *norms), prefix)
        for linear, expert in _unroll((*linears, *mlp), self.experts):
            matrix = self._matrix(linear, prefix, index, expert)
            matrices.append(matrix)
            if self.holds(linear.bias):
                others.append((f"{matrix.name}.bias", (matrix.shape[0],)))
        return matrices, others

    def _matrix(self, linear: Linear, prefix: str, block: int, expert: int | None) -> Matrix:
        return Matrix(
            prefix + linear.path.format(expert=expert),
            (self.widths[linear.out], self.widths[linear.in_]),
            linear.role,
            block,
            prefix + linear.group.format(expert=expert),
            expert=expert,
            transposed_on_disk=linear.transposed,
        )

    def _norms(self, norms: Iterable[Norm], prefix: str) -> list[tuple[str, tuple[int, ...]]]:
        found: list[tuple[str, tuple[int, ...]]] = []
        for norm in norms:
            if not self.holds(norm.when):
                continue
            shape = (self.widths[norm.dim],)
            found.append((f"{prefix}{norm.path}.weight", shape))
            if self.holds(norm.bias):
                found.append((f"{prefix}{norm.path}.bias", shape))
        return found


def _unroll(linears: Iterable[Linear], experts: int) -> Iterator[tuple[Linear, int | None]]:
    """Repeat what belongs to experts, expert by expert, after everything else."""
    shared = [linear for linear in linears if "{expert}" not in linear.path]
    yield from ((linear, None) for linear in shared)
    own = [linear for linear in linears if "{expert}" in linear.path]
    yield from ((linear, expert) for expert in range(experts) for linear in own)


def _known_type(config: Mapping[str, object]) -> str:
    """The `model_type`, if it is one that the table knows.

    Raises:
        ModelError: it is not; the sentence says whether the model has other parts.
    """
    model_type = config.get("model_type")
    works = f"these work: {', '.join(sorted(FAMILIES))}"
    if not isinstance(model_type, str):
        raise ModelError("config.json has no model_type, so the family is unknown", works)
    if config.get("is_encoder_decoder") or config.get("add_cross_attention"):
        raise ModelError(f"{model_type!r} has an encoder; only causal language models work", works)
    if isinstance(config.get("text_config"), Mapping):
        raise ModelError(
            f"{model_type!r} has parts besides its language model; only text models work", works
        )
    if model_type not in FAMILIES:
        raise ModelError(f"unknown model family {model_type!r}", works)
    return model_type


def held_by_forward(architecture: Architecture, index: int) -> int:
    """Numbers that a forward in front of a matrix of block `index` holds of one token, at most.

    The residual stream before and after attention, what was normed of it, and either queries,
    keys, values and what attention made of them, or the inside of the feed-forward part.
    """
    groups = architecture.groups(index).values()
    return 2 * architecture.hidden + max(
        matrices[0].shape[1] + sum(matrix.shape[0] for matrix in matrices) for matrices in groups
    )
