"""Private API of tokenizers: models of merges still have a cache that can be resized; others are left as they are."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models

from apprentice.pretrained.compat import resize_word_cache


@pytest.mark.parametrize("kind", [models.BPE, models.Unigram])
def test_models_of_merges_have_a_cache_to_resize(kind: type) -> None:
    tokenizer = Tokenizer(kind())
    assert hasattr(tokenizer.model, "_resize_cache")
    resize_word_cache(tokenizer, 1 << 10)


def test_a_model_without_a_cache_is_left_as_it_is() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    assert not hasattr(tokenizer.model, "_resize_cache")
    resize_word_cache(tokenizer, 1 << 10)
