"""The small corpus as fixtures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apprentice.data.corpus import Corpus
from tests.data.small import CorpusOf, make_small_corpus


@pytest.fixture(scope="session")
def corpus_of(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> CorpusOf:
    """Makes a corpus over the two tasks; arguments are `training`, and keys of the recipe's `data`."""

    def make(training: dict[str, Any] | None = None, **data: Any) -> Corpus:
        return make_small_corpus(tmp_path_factory.mktemp("corpus"), tiny_model, training, **data)

    return make


@pytest.fixture(scope="session")
def corpus(corpus_of: CorpusOf) -> Corpus:
    """The corpus with all three formats, windows of 32 positions and rows of 256 tokens."""
    return corpus_of()
