"""transformers' own loop of assisted generation, with one of our drafts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from compressor.decoding.early_exit import EarlyExitDraft
from compressor.decoding.proposals import ModelDraft
from compressor.model.quiet import quiet


def settings(drafted: int, exit_: int | None = None) -> dict[str, Any]:
    """What transformers' generation_config needs to draft always as many tokens.

    Args:
        drafted: γ.
        exit_: blocks of a model that drafts for itself; None for a draft of its own.
    """
    found = {
        "num_assistant_tokens": drafted,
        "num_assistant_tokens_schedule": "constant",
        "assistant_confidence_threshold": 0.0,
    }
    return found if exit_ is None else found | {"assistant_early_exit": exit_}


class Assisted:
    """Greedy decoding of one prompt by `generate`; nothing ends it early.

    Args:
        target: a model of transformers.
        draft: who guesses.
        drafted: γ.
        new_tokens: to be generated.
    """

    def __init__(
        self, target: Any, draft: ModelDraft | EarlyExitDraft, drafted: int, new_tokens: int
    ) -> None:
        self.target = target
        self.options: dict[str, Any] = {
            "max_new_tokens": new_tokens, "do_sample": False, "eos_token_id": None,
            "pad_token_id": 0,
        }  # fmt: skip
        if isinstance(draft, EarlyExitDraft):
            self.options |= settings(drafted, draft.exit)
        else:
            assistant = draft.model.model
            # transformers reads these of the assistant, not of the call.
            for name, value in settings(drafted).items():
                setattr(assistant.generation_config, name, value)
            self.options["assistant_model"] = assistant

    def __call__(self, prompt: Sequence[int]) -> tuple[int, ...]:
        """The new tokens."""
        ids = torch.tensor([list(prompt)], device=self.target.device)
        with torch.inference_mode(), quiet():
            found = self.target.generate(ids, attention_mask=torch.ones_like(ids), **self.options)
        return tuple(found[0, len(prompt) :].tolist())
