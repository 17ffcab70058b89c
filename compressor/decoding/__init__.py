"""Decoding with and without a draft, and what it is worth on this machine."""
