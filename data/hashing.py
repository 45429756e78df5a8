"""Hashes of texts: short names for contents, and shares that are drawn by them."""

import hashlib


def hash_text(text: str) -> str:
    """The first 16 hex digits of the text's SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def is_in_share(text: str, share: float) -> bool:
    """Whether a text belongs to a share of all texts, in [0, 1]; a smaller share is part of a larger one.

    The answer depends on the text's hash alone, so every run and every worker gives the same one.
    """
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") < share * 2**64
