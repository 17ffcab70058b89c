"""Prompts as the model expects them: with its chat template when it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REQUEST = "Continue this text:\n\n"


def as_prompt(tokenizer: Any, ids: Sequence[int]) -> list[int]:
    """Tokens that make the model continue a text.

    Args:
        tokenizer: the model's.
        ids: beginning of the text.
    """
    if not getattr(tokenizer, "chat_template", None):
        return list(ids)
    text = tokenizer.decode(list(ids), skip_special_tokens=True)
    messages = [{"role": "user", "content": _REQUEST + text}]
    found = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    return list(found["input_ids"])
