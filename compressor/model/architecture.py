"""From `config.json` to every tensor: names on disk, shapes, roles, and who shares an input.

Nothing here reads a weight or imports torch, so that a plan can be made, and refused, in
milliseconds. What a family looks like is data, in `compressor.model.families`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from compressor.errors import ModelError
from compressor.model.configuration import DTYPE_BYTES, Configuration
from compressor.model.families import FAMILIES, Family, NormKind
from compressor.model.matrices import ROLE_SETS, Matrix, Selection, did_you_mean, select
from compressor.model.serving import rounded_cache, rounded_inputs
from compressor.types import ActivationScheme, CacheScheme, WeightScheme

_KEY_PROJECTIONS = ("k_proj", "qkv_proj")
_READERS = ("q", "k", "v", "qkv", "gate", "up", "gate_up", "fc_in", "router")


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
        read = Configuration(config)
        matrices, others = read.tensors()
        architecture = cls(
            model_type=read.model_type,
            config=config,
            matrices=matrices,
            others=others,
            layers=read.layers,
            hidden=read.hidden,
            heads=read.heads,
            kv_heads=read.kv_heads,
            head_dim=read.head_dim,
            intermediate=read.intermediate,
            vocab=read.vocab,
            max_positions=read.positions,
            tied=read.tied,
            dtype=read.dtype,
            experts=read.experts,
            experts_per_token=read.experts_per_token,
            expert_intermediate=read.expert_intermediate if read.experts else 0,
            sliding_window=read.sliding_window,
            prenorm=read.prenorm,
            logits_softcap=read.logits_softcap,
            logits_divisor=read.logits_divisor,
            cache=rounded_cache(config, read.layers),
        )
        return architecture.with_activations(rounded_inputs(config))

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
                f"the model has no matrix {name!r}", did_you_mean(name, self._by_name)
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
        return sum(math.prod(shape) for _, shape in self.tensors())

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
        return self.with_schemes(dict.fromkeys(names, scheme))

    def with_schemes(self, schemes: Mapping[str, WeightScheme | None]) -> Architecture:
        """The same model with the grids that one stage assigned, by the name of the matrix.

        Raises:
            ModelError: a name belongs to no matrix.
        """
        number = 1 + max((matrix.rounding for matrix in self.matrices), default=0)
        numbered = self._with_each("rounding", dict.fromkeys(schemes, number))
        return numbered._with_each("scheme", schemes)

    def with_activations(self, schemes: Mapping[str, ActivationScheme]) -> Architecture:
        """The same model with the inputs of the matrices of these names rounded; others as before.

        Raises:
            ModelError: a name belongs to no matrix.
        """
        return self._with_each("activations", schemes)

    def with_allotment(self, schemes: Mapping[str, WeightScheme]) -> Architecture:
        """The same model with the grids that a rounder is to use, by the name of the matrix.

        Raises:
            ModelError: a name belongs to no matrix.
        """
        return self._with_each("allotted", schemes)

    def _with_each(self, attribute: str, values: Mapping[str, object]) -> Architecture:
        """An attribute of matrices set anew, by name."""
        chosen = {self.matrix(name).name: {attribute: value} for name, value in values.items()}
        matrices = (
            replace(matrix, **chosen[matrix.name]) if matrix.name in chosen else matrix  # type: ignore[arg-type]
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
                rounding=old[matrix.name].rounding,
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
        return select(self.matrices, patterns, self.tied)


ROOM_BESIDE_PARKED = 64 << 20
"""Bytes that forwards of one model hold in memory while they stand still; the rest is parked."""

MOMENTS_AT_ONCE = 1 << 30
"""Bytes in which second moments of the inputs of experts are summed together."""

SOLVED_AT_ONCE = 1 << 30
"""Bytes of working memory in which matrices of several experts are solved together."""


def moments_held(
    architecture: Architecture, index: int, *, streams: int, sublayers: bool, parts: int = 1
) -> int:
    """Numbers of second moments [in, in] of a block that are held at once, for each of `parts`.

    Of all inputs, or with `sublayers` of one after the other and of those of experts together, as
    far as `MOMENTS_AT_ONCE` allows.

    Args:
        architecture: of the model.
        index: of the block.
        streams: moments of each input, 2 with the parent's beside; of an expert's always 1.
        sublayers: inputs are measured one after the other.
        parts: domains whose moments are kept apart.
    """
    groups = [members[0] for members in architecture.groups(index).values()]
    shared = [streams * one.shape[1] ** 2 for one in groups if one.expert is None]
    routed = [one.shape[1] ** 2 for one in groups if one.expert is not None]
    if not sublayers:
        return sum(shared) + sum(routed)
    return max(*shared, *routed, min(sum(routed), MOMENTS_AT_ONCE // (4 * parts)))


def solving_bytes(matrices: Sequence[Matrix]) -> int:
    """Working memory, at most, of solving an expert's matrices that see the same input.

    H in fp32 once more and in fp64 three times while it is factored; seven copies of the weights
    in fp32.
    """
    weights = sum(matrix.parameters for matrix in matrices)
    return 28 * (matrices[0].shape[1] ** 2 + weights)


def held_by_forward(architecture: Architecture, index: int) -> int:
    """Numbers that a forward in front of a matrix of block `index` holds of one token, at most.

    The residual stream before and after attention, what was normed of it, and either queries,
    keys, values and what attention made of them, or the inside of the feed-forward part.
    """
    groups = architecture.groups(index).values()
    return 2 * architecture.hidden + max(
        matrices[0].shape[1] + sum(matrix.shape[0] for matrix in matrices) for matrices in groups
    )
