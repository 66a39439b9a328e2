"""Private API of tokenizers, with the version it was read in.

tests/pretrained/test_compat.py fails where it is gone.
"""

from __future__ import annotations

from typing import Any


def resize_word_cache(backend: Any, words: int) -> None:
    """Lets a `tokenizers.Tokenizer` remember the ids of up to `words` words (tokenizers 0.23); only some models have a cache."""
    if resize := getattr(backend.model, "_resize_cache", None):
        resize(words)
