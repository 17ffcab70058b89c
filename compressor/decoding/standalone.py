"""A small model of the target's class, made of some of its blocks.

Embedding, norms and head are the target's; an untrained model of random blocks would need far more
text than a few minutes of distillation read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import transformers

from compressor.model.architecture import Architecture
from compressor.model.serving import SERVING

Choice = Literal["ends", "first", "even"]


def chosen_blocks(choice: Choice, count: int, layers: int) -> tuple[int, ...]:
    """Which blocks of a target become the draft's.

    Args:
        choice: `ends`: the first ones and the last; `first`: the first ones; `even`: spread from
            the first to the last.
        count: how many.
        layers: of the target, at least `count`.
    """
    if choice == "first" or count == layers:
        return tuple(range(count))
    if count == 1:
        return (layers - 1,) if choice == "ends" else (0,)
    if choice == "ends":
        return (*range(count - 1), layers - 1)
    return tuple(round(place * (layers - 1) / (count - 1)) for place in range(count))


def standalone(target: Any, blocks: Sequence[int]) -> Any:
    """A model with these blocks of the target, in fp32, in evaluation mode.

    Args:
        target: a causal language model.
        blocks: indices in the target, in the order of the draft.
    """
    config = target.config.to_dict()
    architecture = Architecture.from_config(config)
    config.pop(SERVING, None)  # how the target's inputs and cache are rounded, block by block
    depth = next(key for key in ("num_hidden_layers", "n_layer") if key in config)
    changed: dict[str, Any] = {depth: len(blocks), "dtype": "float32"}
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(config.get(key), list):
            changed[key] = [config[key][block] for block in blocks]
    made = type(target.config).from_dict(config | changed)
    with torch.random.fork_rng(devices=[]):  # the random start of weights that are replaced anyway
        model = transformers.AutoModelForCausalLM.from_config(
            made, dtype=torch.float32, attn_implementation=target.config._attn_implementation
        )
    path = f"{architecture.blocks_path}."
    weights = target.state_dict()
    model.load_state_dict(
        {name: weights[_source(name, path, blocks)].float() for name in model.state_dict()}
    )
    model.tie_weights()
    return model.eval().to(next(target.parameters()).device)


def _source(name: str, path: str, blocks: Sequence[int]) -> str:
    """Name in the target of a tensor of the draft."""
    if not name.startswith(path):
        return name
    index, _, rest = name.removeprefix(path).partition(".")
    return f"{path}{blocks[int(index)]}.{rest}"
