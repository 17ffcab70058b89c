"""Compress language models: quantize, prune, distil a draft, and report what it cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from compressor.pipeline import Pipeline

__all__ = ["Pipeline", "__version__"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """`Pipeline` is imported when asked for, so that `compress --help` need not wait for it."""
    if name == "Pipeline":
        from compressor.pipeline import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
