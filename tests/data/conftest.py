"""The small corpus as fixtures."""

from __future__ import annotations

import json
import shutil
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
def encoder_decoder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's tokenizer, ending each text as T5's does, beside the config.json of a T5; no weights."""
    folder = tmp_path_factory.mktemp("encoder_decoder")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_model / name, folder)
    content = json.loads((folder / "tokenizer.json").read_text())
    parts = [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]
    known = {"<|im_end|>": {"id": "<|im_end|>", "ids": [2], "tokens": ["<|im_end|>"]}}
    processor = {"type": "TemplateProcessing", "single": parts, "pair": parts, "special_tokens": known}
    (folder / "tokenizer.json").write_text(json.dumps(content | {"post_processor": processor}))
    (folder / "config.json").write_text('{"model_type": "t5", "is_encoder_decoder": true}')
    return folder


@pytest.fixture(scope="session")
def pairs_of(encoder_decoder: Path, tmp_path_factory: pytest.TempPathFactory) -> CorpusOf:
    """`corpus_of` for an encoder-decoder."""

    def make(training: dict[str, Any] | None = None, **data: Any) -> Corpus:
        return make_small_corpus(tmp_path_factory.mktemp("pairs"), encoder_decoder, training, **({"layout": "plain"} | data))

    return make


@pytest.fixture(scope="session")
def corpus(corpus_of: CorpusOf) -> Corpus:
    """The corpus with all three formats, windows of 32 positions and rows of 256 tokens."""
    return corpus_of()
