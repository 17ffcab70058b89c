"""One `config.json` read against the row of its family."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from compressor.errors import ModelError
from compressor.model.families import FAMILIES, Condition, Linear, Norm
from compressor.model.matrices import Matrix

_MOST_PARTS = 100_000  # blocks, or experts of all blocks: several times what any model has
DTYPE_BYTES: Mapping[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}


def attention_implementation(config: Mapping[str, object]) -> str:
    """`eager` where transformers has no fused attention for the family, else `sdpa`."""
    row = FAMILIES.get(str(config.get("model_type")))
    capped = config.get("attn_logit_softcapping") or (row is not None and row.eager)
    return "eager" if capped else "sdpa"


Tensor = tuple[str, tuple[int, ...]]
"""Name on disk, and shape."""


class Configuration:
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
        self._require_possible()
        self.tied = self._boolean("tie_word_embeddings")
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

    def _boolean(self, key: str) -> bool:
        value = self.value(key)
        if value is not None and not isinstance(value, bool):
            raise ModelError(
                f"config.json of a {self.row.name} model: {key!r} must be true or false,"
                f" not {value!r}"
            )
        return bool(value)

    def _require_possible(self) -> None:
        """Numbers that no model has would keep us counting its matrices for hours."""
        if self.layers * max(self.experts, 1) > _MOST_PARTS:
            experts = f" of {self.experts:,} experts" if self.experts else ""
            raise ModelError(
                f"config.json of a {self.row.name} model: 'num_hidden_layers' is {self.layers:,}"
                f"{experts}; at most {_MOST_PARTS:,} can be"
            )

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

    def tensors(self) -> tuple[tuple[Matrix, ...], tuple[Tensor, ...]]:
        """Matrices in the order in which a forward pass uses them, and all other tensors."""
        matrices, others = self._tables("before"), []
        for index in range(self.layers):
            found, extra = self._block(index)
            matrices += found
            others += extra
        others += self._norms(self.row.final, "")
        matrices += self._tables("after")
        return tuple(matrices), tuple(others)

    @property
    def experts_per_token(self) -> int:
        """Experts that a token goes through; 0 without any."""
        return self.integer("num_experts_per_tok", 1) if self.experts else 0

    @property
    def prenorm(self) -> bool:
        """Whether norms stand before what they feed, and the residual stream is never normed."""
        return self.row.prenorm and self.flags["before"]

    @property
    def logits_softcap(self) -> float | None:
        """What logits are bent below; None where they are not."""
        softcap = self.value("final_logit_softcapping")
        return float(softcap) if isinstance(softcap, (int, float)) else None

    @property
    def dtype(self) -> str:
        """Of the weights, without `torch.`.

        Raises:
            ModelError: not one that weights can have.
        """
        value = self.config.get("dtype") or self.config.get("torch_dtype") or "float32"
        name = str(value).removeprefix("torch.")
        if name not in DTYPE_BYTES:
            raise ModelError(
                f"config.json has dtype {name!r}; weights must be {', '.join(sorted(DTYPE_BYTES))}"
            )
        return name

    @property
    def sliding_window(self) -> int | None:
        """Tokens that attention looks back; None: all."""
        if self.value("use_sliding_window") is False:
            return None
        key = "sliding_window"
        explicit = key in self.config
        value = self.config[key] if explicit else self.row.defaults.get(key)
        return value if isinstance(value, int) else None

    @property
    def logits_divisor(self) -> float:
        """What logits are divided by."""
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

    def _block(self, index: int) -> tuple[list[Matrix], list[Tensor]]:
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

    def _norms(self, norms: Iterable[Norm], prefix: str) -> list[Tensor]:
        found: list[Tensor] = []
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
