"""Prompts as the model expects them: with its chat template when it has one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_REQUEST = "Continue this text:\n\n"
_PLACE = "<<request>>"


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


def asking(tokenizer: Any) -> tuple[list[int], list[int]] | None:
    """What stands before a user's request and between it and the answer; None without a template.

    A model that was tuned to answer also knows how its users ask: continued after the first part
    it writes a request (Xu et al. 2024, Magpie, arXiv:2406.08464).

    Args:
        tokenizer: the model's.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PLACE}], add_generation_prompt=True, tokenize=False
    )
    parts = text.split(_PLACE)
    if len(parts) != 2 or not parts[1]:  # a template that rewrites what it is given
        return None
    first, second = (list(tokenizer(part, add_special_tokens=False)["input_ids"]) for part in parts)
    return first, second
