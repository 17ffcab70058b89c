"""EAGLE-3 heads as files: names and configurations of two dialects, dict to dict.

`flat` is what SGLang, vLLM and llama.cpp read; `speculators` is what `vllm serve DRAFT` reads by
itself. Only the subset that all of them agree on is written: one layer, residual before the norm,
no norm before `fc`. The features are the outputs of three blocks; engines take the default triple
(2, L // 2, L - 3) when no ids are given, and disagree on what an id means, so ids are written only
for other layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from compressor.errors import ModelError

FLAT, _SPECULATORS = "midlayer.", "layers.0."
_OUTSIDE = {"fc.weight", "norm.weight", "lm_head.weight", "d2t", "t2d"}


def default_layers(layers: int) -> tuple[int, int, int]:
    """The entries of transformers' `hidden_states` that every engine reads by default.

    Args:
        layers: blocks of the target, at least 4.
    """
    return 2, layers // 2, layers - 3


def speculators_tensors(flat: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of the speculators library.

    Raises:
        ModelError: a tensor is not one of an EAGLE-3 head.
    """
    found = {}
    for name, tensor in flat.items():
        if name not in _OUTSIDE and not name.startswith(FLAT):
            raise ModelError(f"{name} is no tensor of an EAGLE-3 head")
        inside = name.startswith(FLAT)
        found[_SPECULATORS + name.removeprefix(FLAT) if inside else name] = tensor
    return found


def flat_config(
    layer: Mapping[str, Any], draft_vocab: int, target_layers: int, features: Sequence[int]
) -> dict[str, Any]:
    """`config.json` of the flat dialect.

    Args:
        layer: configuration of a Llama model with the draft's one layer and the target's
            vocabulary.
        draft_vocab: tokens that the draft can propose.
        target_layers: blocks of the target.
        features: entries of transformers' `hidden_states` that are fused.
    """  # fmt: skip
    ids = {}
    if tuple(features) != default_layers(target_layers):
        ids = {
            "eagle_aux_hidden_state_layer_ids": list(features),  # vLLM: hidden_states[i]
            # SGLang reads this one: hidden_states[i + 1]
            "eagle_config": {"eagle_aux_hidden_state_layer_ids": [i - 1 for i in features]},
        }
    return {
        **layer,
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "num_hidden_layers": 1,
        # The head is the draft's own even where the target ties: SGLang would alias it.
        "tie_word_embeddings": False,
        "draft_vocab_size": draft_vocab,
        **ids,
    }


def speculators_config(
    layer: Mapping[str, Any],
    draft_vocab: int,
    features: Sequence[int],
    drafted: int,
    verifier: Mapping[str, Any],
) -> dict[str, Any]:
    """`config.json` of the speculators dialect.

    Args:
        layer, draft_vocab, features: as in `flat_config`.
        drafted: tokens to draft before each pass.
        verifier: `name_or_path` and `architectures` of the target.
    """
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "transformer_layer_config": {**layer, "num_hidden_layers": 1, "model_type": "llama"},
        "draft_vocab_size": draft_vocab,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "fc_norm": False,
        "norm_output": False,
        "tie_word_embeddings": False,
        "eagle_aux_hidden_state_layer_ids": list(features),
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": drafted}],
            "verifier": dict(verifier),
        },
    }
