"""What distinguishes the model families that we can walk, as data.

A family is one row: the defaults of its configuration class, the names its tensors have on
disk, and which widths, biases and norms a block has. No family has code of its own;
`compressor.model.architecture` turns a row and a `config.json` into names and shapes.

The names are those that transformers 5.23 writes with `save_pretrained`, which are also those
of the checkpoints on the Hub. Widths are symbols (`hidden`, `query`, `kv`, …) that
`Architecture` resolves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Condition = bool | str
"""Always, never, or the name of the boolean configuration key that decides."""

NormKind = Literal["rms", "rms_plus_one", "layer"]
"""RMSNorm scaled by w, RMSNorm scaled by 1 + w (Gemma), or LayerNorm, which also centres."""


@dataclass(frozen=True)
class Linear:
    """A matrix [out, in] of a block, perhaps with a bias [out].

    Attributes:
        role: what it does (`q`, `gate`, `router`, …).
        path: its name below the block; `{expert}` stands for the number of the expert.
        out: symbol of the output width.
        in_: symbol of the input width.
        group: label of the input; matrices of a block with equal labels see the same input.
        bias: whether it has a bias.
        transposed: stored [in, out] (the Conv1D of GPT-2).
    """

    role: str
    path: str
    out: str
    in_: str
    group: str
    bias: Condition = False
    transposed: bool = False


@dataclass(frozen=True)
class Norm:
    """A normalisation weight [dim], perhaps with a bias [dim]."""

    path: str
    dim: str = "hidden"
    bias: Condition = False
    when: Condition = True


@dataclass(frozen=True)
class Table:
    """A matrix outside the blocks: embedding, positions, projection; names from the root."""

    role: str
    path: str
    out: str
    in_: str
    when: Condition = True


@dataclass(frozen=True)
class Family:
    """One row.

    Attributes:
        name: for people.
        blocks: path of the list of blocks in the model and on disk.
        outer: tables before the blocks, in the order in which they are used.
        attention: matrices and norms of the attention half, in execution order.
        mlp: those of the dense feed-forward half.
        norms: norms of the block that belong to neither half.
        final: norms after the last block (paths from the root).
        head: name of the output matrix on disk; its input is as wide as `head_in`.
        experts: the feed-forward half of a sparse block; empty for dense families.
        defaults: values of configuration keys that a `config.json` may leave out.
        prenorm: whether each half reads a normalised residual stream and adds to it raw, so
            that a norm can be folded into the matrices behind it.
        renames: (on disk, in the module tree) pairs of name parts that differ.
        eager: whether transformers has no fused attention for the family.
        grouped_heads: whether there may be fewer key-value heads than query heads.
        aliases: configuration keys that the family calls otherwise than the others.
        norm: what its norms over the residual stream compute.
        interleaved: whether a fused `qkv` holds q, k and v head by head instead of one after
            the other.
    """

    name: str
    blocks: str
    outer: tuple[Table, ...]
    attention: tuple[Linear | Norm, ...]
    mlp: tuple[Linear, ...]
    norms: tuple[Norm, ...]
    final: tuple[Norm, ...]
    defaults: Mapping[str, object]
    head: str = "lm_head"
    head_in: str = "hidden"
    experts: tuple[Linear, ...] = ()
    prenorm: bool = True
    renames: tuple[tuple[str, str], ...] = ()
    eager: bool = False
    grouped_heads: bool = True
    aliases: Mapping[str, str] = field(default_factory=dict)
    norm: NormKind = "rms"
    interleaved: bool = False


def _attention(bias: Condition = False, out_bias: Condition | None = None) -> tuple[Linear, ...]:
    """Four projections below `self_attn`; the output's bias follows the others' unless given."""
    return (
        Linear("q", "self_attn.q_proj", "query", "hidden", "attention.in", bias),
        Linear("k", "self_attn.k_proj", "kv", "hidden", "attention.in", bias),
        Linear("v", "self_attn.v_proj", "kv", "hidden", "attention.in", bias),
        Linear(
            "o",
            "self_attn.o_proj",
            "hidden",
            "query",
            "attention.out",
            bias if out_bias is None else out_bias,
        ),
    )


def _gated(bias: Condition = False) -> tuple[Linear, ...]:
    return (
        Linear("gate", "mlp.gate_proj", "intermediate", "hidden", "mlp.in", bias),
        Linear("up", "mlp.up_proj", "intermediate", "hidden", "mlp.in", bias),
        Linear("down", "mlp.down_proj", "hidden", "intermediate", "mlp.out", bias),
    )


def _experts(folder: str, gate: str, up: str, down: str) -> tuple[Linear, ...]:
    expert = f"{folder}.experts.{{expert}}"
    group = "experts.{expert}"
    return (
        Linear("router", f"{folder}.gate", "experts", "hidden", "mlp.in"),
        Linear("gate", f"{expert}.{gate}", "expert_intermediate", "hidden", f"{group}.in"),
        Linear("up", f"{expert}.{up}", "expert_intermediate", "hidden", f"{group}.in"),
        Linear("down", f"{expert}.{down}", "hidden", "expert_intermediate", f"{group}.out"),
    )


def _fully_connected(prefix: str, first: str, second: str, bias: Condition) -> tuple[Linear, ...]:
    return (
        Linear("fc_in", f"{prefix}{first}", "intermediate", "hidden", "mlp.in", bias),
        Linear("fc_out", f"{prefix}{second}", "hidden", "intermediate", "mlp.out", bias),
    )


def _head_norms(query: str = "head_dim", kv: str = "head_dim") -> tuple[Norm, ...]:
    return Norm("self_attn.q_norm", query), Norm("self_attn.k_norm", kv)


_TWO_NORMS = (Norm("input_layernorm"), Norm("post_attention_layernorm"))
_FOUR_NORMS = (*_TWO_NORMS, Norm("pre_feedforward_layernorm"), Norm("post_feedforward_layernorm"))
_EMBED = (Table("embed", "model.embed_tokens", "vocab", "hidden"),)
_FINAL = (Norm("model.norm"),)


def _decoder(
    name: str,
    defaults: Mapping[str, object],
    *,
    attention: tuple[Linear | Norm, ...],
    mlp: tuple[Linear, ...] = _gated(),
    norms: tuple[Norm, ...] = _TWO_NORMS,
    experts: tuple[Linear, ...] = (),
    renames: tuple[tuple[str, str], ...] = (),
    prenorm: bool = True,
    eager: bool = False,
    norm: NormKind = "rms",
) -> Family:
    """A family with Llama's names outside the blocks."""
    return Family(
        name,
        "model.layers",
        _EMBED,
        attention,
        mlp,
        norms,
        _FINAL,
        defaults,
        experts=experts,
        renames=renames,
        prenorm=prenorm,
        eager=eager,
        norm=norm,
    )


def _sizes(
    vocab: int,
    hidden: int,
    intermediate: int | None,
    layers: int,
    heads: int,
    kv_heads: int | None,
    positions: int,
    *,
    tied: bool = False,
    **more: object,
) -> dict[str, object]:
    """Defaults under the key names that most families share."""
    return {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
        **more,
    }


_GEMMA_SIZES = _sizes(
    256000, 2304, 9216, 26, 8, 4, 8192, tied=True, head_dim=256, sliding_window=4096
)

FAMILIES: Mapping[str, Family] = {
    "llama": _decoder(
        "Llama",
        _sizes(32000, 4096, 11008, 32, 32, None, 2048),
        attention=_attention("attention_bias"),
        mlp=_gated("mlp_bias"),
    ),
    "mistral": _decoder(
        "Mistral",
        _sizes(32000, 4096, 14336, 32, 32, 8, 131072, sliding_window=4096),
        attention=_attention(),
    ),
    "qwen2": _decoder(
        "Qwen2",
        _sizes(151936, 4096, 22016, 32, 32, 32, 32768, use_sliding_window=False),
        attention=_attention(True, out_bias=False),
    ),
    "qwen3": _decoder(
        "Qwen3",
        _sizes(151936, 4096, 22016, 32, 32, 32, 32768, head_dim=128, use_sliding_window=False),
        attention=(*_attention("attention_bias"), *_head_norms()),
    ),
    "gemma2": _decoder(
        "Gemma 2",
        {**_GEMMA_SIZES, "final_logit_softcapping": 30.0},
        attention=_attention("attention_bias"),
        norms=_FOUR_NORMS,
        prenorm=False,
        eager=True,
        norm="rms_plus_one",
    ),
    "gemma3_text": _decoder(
        "Gemma 3",
        {**_GEMMA_SIZES, "vocab_size": 262208, "max_position_embeddings": 131072},
        attention=(*_attention("attention_bias"), *_head_norms()),
        norms=_FOUR_NORMS,
        prenorm=False,
        norm="rms_plus_one",
    ),
    "phi3": _decoder(
        "Phi-3",
        _sizes(32064, 3072, 8192, 32, 32, None, 4096),
        attention=(
            Linear("qkv", "self_attn.qkv_proj", "qkv", "hidden", "attention.in"),
            Linear("o", "self_attn.o_proj", "hidden", "query", "attention.out"),
        ),
        mlp=(
            Linear("gate_up", "mlp.gate_up_proj", "gate_up", "hidden", "mlp.in"),
            Linear("down", "mlp.down_proj", "hidden", "intermediate", "mlp.out"),
        ),
    ),
    "olmo2": _decoder(
        "OLMo 2",
        _sizes(50304, 4096, 11008, 32, 32, None, 2048),
        attention=(*_attention("attention_bias"), *_head_norms("query", "kv")),
        norms=(Norm("post_attention_layernorm"), Norm("post_feedforward_layernorm")),
        prenorm=False,
    ),
    "smollm3": _decoder(
        "SmolLM3",
        _sizes(128256, 2048, 11008, 36, 16, 4, 32768, tied=True, use_sliding_window=False),
        attention=_attention("attention_bias"),
        mlp=_gated("mlp_bias"),
    ),
    "granite": _decoder(
        "Granite",
        _sizes(32000, 4096, 11008, 32, 32, None, 2048),
        attention=_attention("attention_bias"),
        mlp=_gated("mlp_bias"),
    ),
    "mixtral": _decoder(
        "Mixtral",
        _sizes(32000, 4096, 14336, 32, 32, 8, 131072, num_local_experts=8, num_experts_per_tok=2),
        attention=_attention(),
        experts=_experts("block_sparse_moe", "w1", "w3", "w2"),
        renames=((".block_sparse_moe.", ".mlp."),),
    ),
    "qwen3_moe": _decoder(
        "Qwen3-MoE",
        _sizes(
            151936,
            2048,
            6144,
            24,
            32,
            4,
            32768,
            use_sliding_window=False,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            decoder_sparse_step=1,
        ),
        attention=(*_attention("attention_bias"), *_head_norms()),
        experts=_experts("mlp", "gate_proj", "up_proj", "down_proj"),
    ),
    "gpt_neox": Family(
        "GPT-NeoX",
        "gpt_neox.layers",
        (Table("embed", "gpt_neox.embed_in", "vocab", "hidden"),),
        (
            Linear(
                "qkv",
                "attention.query_key_value",
                "qkv",
                "hidden",
                "attention.in",
                "attention_bias",
            ),
            Linear("o", "attention.dense", "hidden", "query", "attention.out", "attention_bias"),
        ),
        _fully_connected("mlp.", "dense_h_to_4h", "dense_4h_to_h", True),
        (Norm("input_layernorm", bias=True), Norm("post_attention_layernorm", bias=True)),
        (Norm("gpt_neox.final_layer_norm", bias=True),),
        _sizes(50432, 6144, 24576, 44, 64, None, 2048, attention_bias=True),
        head="embed_out",
        grouped_heads=False,
        norm="layer",
        interleaved=True,
        renames=(("embed_out.", "lm_head."),),
    ),
    "opt": Family(
        "OPT",
        "model.decoder.layers",
        (
            Table("embed", "model.decoder.embed_tokens", "vocab", "embed_dim"),
            Table("position", "model.decoder.embed_positions", "positions", "hidden"),
            Table(
                "project_in", "model.decoder.project_in", "hidden", "embed_dim", "embed_projected"
            ),
            Table(
                "project_out", "model.decoder.project_out", "embed_dim", "hidden", "embed_projected"
            ),
        ),
        (
            Linear("q", "self_attn.q_proj", "query", "hidden", "attention.in", "enable_bias"),
            Linear("k", "self_attn.k_proj", "kv", "hidden", "attention.in", "enable_bias"),
            Linear("v", "self_attn.v_proj", "kv", "hidden", "attention.in", "enable_bias"),
            Linear("o", "self_attn.out_proj", "hidden", "query", "attention.out", "enable_bias"),
        ),
        _fully_connected("", "fc1", "fc2", "enable_bias"),
        tuple(
            Norm(path, bias="layer_norm_elementwise_affine", when="layer_norm_elementwise_affine")
            for path in ("self_attn_layer_norm", "final_layer_norm")
        ),
        (Norm("model.decoder.final_layer_norm", bias=True, when="final_norm"),),
        _sizes(
            50272,
            768,
            3072,
            12,
            12,
            None,
            2048,
            tied=True,
            enable_bias=True,
            layer_norm_elementwise_affine=True,
            do_layer_norm_before=True,
        ),
        head_in="embed_dim",
        grouped_heads=False,
        norm="layer",
        aliases={"intermediate_size": "ffn_dim"},
    ),
    "gpt2": Family(
        "GPT-2",
        "transformer.h",
        (
            Table("embed", "transformer.wte", "vocab", "hidden"),
            Table("position", "transformer.wpe", "positions", "hidden"),
        ),
        (
            Linear("qkv", "attn.c_attn", "qkv", "hidden", "attention.in", True, True),
            Linear("o", "attn.c_proj", "hidden", "query", "attention.out", True, True),
        ),
        (
            Linear("fc_in", "mlp.c_fc", "intermediate", "hidden", "mlp.in", True, True),
            Linear("fc_out", "mlp.c_proj", "hidden", "intermediate", "mlp.out", True, True),
        ),
        (Norm("ln_1", bias=True), Norm("ln_2", bias=True)),
        (Norm("transformer.ln_f", bias=True),),
        _sizes(50257, 768, None, 12, 12, None, 1024, tied=True),
        grouped_heads=False,
        norm="layer",
        aliases={
            "hidden_size": "n_embd",
            "num_hidden_layers": "n_layer",
            "num_attention_heads": "n_head",
            "max_position_embeddings": "n_positions",
            "intermediate_size": "n_inner",
        },
    ),
}
