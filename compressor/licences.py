"""What the licence of an original model asks of whoever publishes a changed one."""

from __future__ import annotations

import re

from compressor.errors import AccessError

_NO_DERIVATIVES = re.compile(r"(^|-)nd(-|$)")
_LLAMA = re.compile(r"llama-?[34]")
_GEMMA_NOTICE = (
    "Gemma is provided under and subject to the Gemma Terms of Use found at "
    "ai.google.dev/gemma/terms\n"
)


def licence_gate(
    licence: str | None, repo: str, *, public: bool
) -> tuple[tuple[str, ...], dict[str, str]]:
    """What a licence asks of whoever publishes a changed model.

    Returns:
        Sentences for the person who publishes, and files to add by name.

    Raises:
        AccessError: it forbids derivatives, is not known, or names are not as it wants.
    """
    known = (licence or "").lower()
    if _NO_DERIVATIVES.search(known):
        raise AccessError(f"the licence {licence} forbids publishing a changed model")
    if not known and public:
        raise AccessError(
            "the licence of the original model is not known, so the result stays private",
            "state it as `license:` in the front matter of the original's README.md",
        )
    if _LLAMA.search(known):
        return _llama_terms(known, repo)
    if known == "gemma":
        return ("NOTICE carries Gemma's terms on",), {"NOTICE": _GEMMA_NOTICE}
    return (), {}


def _llama_terms(licence: str, repo: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """Llama 3 and later: the name begins with Llama, a notice goes along (section 1.b)."""
    name = repo.partition("/")[2]
    if not name.startswith("Llama"):
        raise AccessError(
            f"the licence {licence} wants the name of a derived model to begin with 'Llama'",
            f"for example {repo.partition('/')[0]}/Llama-{name}",
        )
    version = licence.removeprefix("llama").lstrip("-")
    notice = (
        f"Built with Llama\n\nLlama {version} is licensed under the Llama {version} Community "
        "License, Copyright © Meta Platforms, Inc. All Rights Reserved.\n"
    )
    return ("NOTICE says 'Built with Llama'; add the agreement itself",), {"NOTICE": notice}
