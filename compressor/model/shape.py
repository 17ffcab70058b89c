"""How large a model is, how large it may become, and the width that meets a budget.

All from `config.json`, without torch, so that a plan can refuse a size before a weight is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from compressor.errors import ModelError
from compressor.model.architecture import Architecture

WHOLE_HEADS = ("llama", "gemma2", "gemma3_text")
"""Their configuration classes demand that heads divide the hidden size, even with `head_dim`."""

_FIXED_HEADS = {
    "gpt2": "its head size is the hidden size over the number of heads, so heads cannot go",
    "opt": "its head size is the hidden size over the number of heads, so heads cannot go",
    "gpt_neox": "its head size is the hidden size over the number of heads, so heads cannot go",
    "olmo2": "it normalises queries over all heads together, so none can go alone",
}


FreeSize = Literal["layers", "channels", "experts", "hidden"]
"""Sizes that a budget can decide."""


@dataclass(frozen=True)
class Shape:
    """The sizes that pruning changes; every block has the same.

    Attributes:
        layers: decoder blocks.
        kv_heads: key-value heads of a block.
        heads: query heads of a block, the same number for every key-value head.
        channels: inner width of a feed-forward half, or of every expert.
        experts: of a block that has any; 0 where no block has.
        hidden: channels of the residual stream.
    """

    layers: int
    kv_heads: int
    heads: int
    channels: int
    experts: int = 0
    hidden: int = 0


@dataclass(frozen=True)
class Fault:
    """Why a size is impossible: the name of the size in `Shape`, a sentence, what would work."""

    size: str
    message: str
    hint: str


def shape_of(architecture: Architecture) -> Shape:
    """The present sizes."""
    return Shape(
        architecture.layers,
        architecture.kv_heads,
        architecture.heads,
        architecture.expert_intermediate if architecture.experts else architecture.intermediate,
        architecture.experts,
        architecture.hidden,
    )


def channels_key(architecture: Architecture) -> str:
    """The configuration key, as Llama has it, behind `Shape.channels`."""
    own = architecture.experts and architecture.model_type == "qwen3_moe"
    return "moe_intermediate_size" if own else "intermediate_size"


def experts_key(architecture: Architecture) -> str:
    """The configuration key that says how many experts there are."""
    known = "num_local_experts" in architecture.config or architecture.model_type == "mixtral"
    return "num_local_experts" if known else "num_experts"


def resized(architecture: Architecture, shape: Shape) -> Architecture:
    """The model at another size; lists with an entry per block are cut to the first ones.

    Only keys that change are written, and `head_dim` becomes explicit where heads or channels of
    the stream go, because its default would change with them.
    """
    now = shape_of(architecture)
    changes: dict[str, object] = {}
    if shape.layers != now.layers:
        changes["num_hidden_layers"] = shape.layers
        for key, value in architecture.config.items():
            if isinstance(value, list) and len(value) == now.layers and key in PER_LAYER:
                changes[key] = value[: shape.layers]
    if (shape.heads, shape.kv_heads) != (now.heads, now.kv_heads):
        changes["num_attention_heads"] = shape.heads
        changes["num_key_value_heads"] = shape.kv_heads
        changes["head_dim"] = architecture.head_dim
    if shape.channels != now.channels:
        changes[channels_key(architecture)] = shape.channels
    if shape.experts != now.experts:
        changes[experts_key(architecture)] = shape.experts
    if shape.hidden != now.hidden:
        changes["hidden_size"] = shape.hidden
        changes["head_dim"] = architecture.head_dim
    return architecture.with_config(**changes) if changes else architecture


PER_LAYER = ("layer_types", "no_rope_layers", "mlp_layer_types")
"""Configuration keys that may hold a list with one entry per block."""


def faults(architecture: Architecture, shape: Shape) -> Iterator[Fault]:
    """Everything that forbids to shrink the model to a size."""
    now = shape_of(architecture)
    for size in ("layers", "kv_heads", "heads", "channels", "experts", "hidden"):
        before, after = getattr(now, size), getattr(shape, size)
        if not min(1, before) <= after <= before:
            word = size.replace("_", "-")
            message = f"{after} {word} cannot be kept: the model has {before}"
            yield Fault(size, message, f"write a number from 1 to {before}")
            return
    if shape.layers != now.layers:
        yield from _layer_faults(architecture)
    if shape.hidden != now.hidden:
        yield from _hidden_faults(architecture, shape)
    if shape.experts < (least := architecture.experts_per_token):
        message = f"{shape.experts} experts are fewer than the {least} that every token is given to"
        yield Fault("experts", f"{message} (num_experts_per_tok)", f"keep at least {least}")
    if (shape.heads, shape.kv_heads) != (now.heads, now.kv_heads):
        yield from _head_faults(architecture, shape)


def _hidden_faults(architecture: Architecture, shape: Shape) -> Iterator[Fault]:
    family, model_type = architecture.family, architecture.model_type
    if not (architecture.prenorm and architecture.norm == "rms"):
        message = (
            f"channels of the stream of {family} cannot be pruned: its norms are not RMSNorms "
        )
        yield Fault("hidden", f"{message}before each half of a block", "prune.obs works on it")
    elif model_type in WHOLE_HEADS and shape.hidden % shape.heads:
        near = shape.hidden // shape.heads * shape.heads
        yield Fault(
            "hidden",
            f"{family} needs a hidden size that its heads ({shape.heads}) divide, and "
            f"{shape.hidden} is none",
            f"write {near or shape.heads} or {near + shape.heads}",
        )


def _layer_faults(architecture: Architecture) -> Iterator[Fault]:
    config = architecture.config
    if config.get("scale_attn_by_inverse_layer_idx"):
        message = "attention is scaled by the number of the block, so blocks cannot move up"
        yield Fault("layers", message, "prune widths instead")
    step = config.get("decoder_sparse_step") or 1
    if architecture.experts and (step != 1 or config.get("mlp_only_layers")):
        message = "blocks with experts and blocks without alternate, so that the parameters "
        message += "depend on which ones go"
        yield Fault("layers", message, "prune widths instead")


def _head_faults(architecture: Architecture, shape: Shape) -> Iterator[Fault]:
    family = architecture.family
    if reason := _FIXED_HEADS.get(architecture.model_type):
        yield Fault("heads", f"heads of {family} cannot be pruned: {reason}", "prune channels")
        return
    if shape.heads % shape.kv_heads:
        yield Fault(
            "heads",
            f"{shape.heads} query heads cannot share {shape.kv_heads} key-value heads evenly",
            f"keep a multiple of {shape.kv_heads} query heads",
        )
    elif shape.heads // shape.kv_heads > architecture.heads // architecture.kv_heads:
        share = architecture.heads // architecture.kv_heads
        yield Fault(
            "heads",
            f"{shape.heads} query heads on {shape.kv_heads} key-value heads are "
            f"{shape.heads // shape.kv_heads} each, and the model has {share}",
            f"keep at most {share * shape.kv_heads} query heads",
        )
    elif architecture.model_type in WHOLE_HEADS and architecture.hidden % shape.heads:
        works = [
            str(heads)
            for heads in range(shape.kv_heads, architecture.heads + 1, shape.kv_heads)
            if architecture.hidden % heads == 0
        ]
        yield Fault(
            "heads",
            f"{family} needs a hidden size ({architecture.hidden}) that its heads divide, and "
            f"{shape.heads} do not",
            f"numbers of query heads that work: {', '.join(works) or 'none'}",
        )


def fitted(
    architecture: Architecture,
    shape: Shape,
    size: str,
    budget: int,
    *,
    multiple: int = 1,
    at_most: bool = False,
) -> Shape:
    """The shape with one size chosen so that the model has about `budget` parameters.

    Parameters are linear in every size of a `Shape`, so two models are enough to solve for it.

    Args:
        architecture: the model as it is.
        shape: the other sizes.
        size: a `FreeSize`.
        budget: parameters, ties counted once.
        multiple: the size is a multiple of this, or stays as it is.
        at_most: stay within the budget instead of coming as near as possible.

    Raises:
        ModelError: even the smallest size does not reach the budget.
    """
    most = getattr(shape_of(architecture), size)
    full = _parameters(architecture, replace(shape, **{size: most}))
    per_unit = full - _parameters(architecture, replace(shape, **{size: most - 1}))
    sizes = sorted({most, *range(multiple, most, multiple)})

    def miss(value: int) -> float:
        over = full - per_unit * (most - value) - budget
        return float("inf") if at_most and over > 0 else abs(over)

    best = min(sizes, key=lambda value: (miss(value), -value))
    least = full - per_unit * (most - sizes[0])
    if miss(best) == float("inf") or (best == sizes[0] and least > budget + per_unit * multiple):
        raise ModelError(
            f"{budget:,} parameters cannot be reached by {size} alone: {sizes[0]} {size} in "
            f"place of {most} still leave {least:,}"
        )
    return replace(shape, **{size: best})


def _parameters(architecture: Architecture, shape: Shape) -> int:
    """Of the model at a size that `faults` need not allow."""
    if shape.channels < 1 or shape.layers < 1:
        two = replace(shape, layers=max(shape.layers, 1), channels=max(shape.channels, 1))
        size = "channels" if shape.channels < 1 else "layers"
        one = resized(architecture, two).parameters
        more = resized(architecture, replace(two, **{size: 2})).parameters
        return 2 * one - more
    return resized(architecture, shape).parameters
