"""Compress language models: quantize, prune, distil a draft, and report what it cost."""

__version__ = "0.1.0"
