"""The tokenizer: plain encoding, special tokens, cutting, fingerprint."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.errors import ModelError
from apprentice.pretrained.tokenizer import Tokenizer

TEXT = "Name three colours: rød, 绿色 and 🙂 blue."


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


@pytest.fixture
def folder(tiny_model: Path, tmp_path: Path) -> Path:
    """A copy of the tokenizer's files that a test may change."""
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(tiny_model / name, tmp_path / name)
    return tmp_path


def edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    file.write_text(json.dumps({key: value for key, value in (content | changes).items() if value is not None}))


def test_special_tokens(tokenizer: Tokenizer) -> None:
    assert (tokenizer.pad_id, tokenizer.end_id, tokenizer.end_text, len(tokenizer)) == (0, 2, "<|im_end|>", 512)
    assert (tokenizer.start_ids, tokenizer.finish_ids) == ((), ())
    assert tokenizer.encode("<|im_start|>a<|im_end|>") == [1, *tokenizer.encode("a"), 2]


def test_text_survives(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode_batch([TEXT, "", "a"]) == [ids, [], tokenizer.encode("a")]
    assert tokenizer.decode([*ids, 2]) == TEXT
    assert tokenizer.decode([*ids, 2], skip_special=False) == TEXT + "<|im_end|>"


PIECES = st.sampled_from(["<|im_start|>", "<|im_end|>", "<|im_", "|>", " ", "\n", "\n\n", "a", "user", "The film", "é🙂", ".", ""])


@settings(max_examples=200, deadline=None)
@given(texts=st.lists(st.lists(PIECES, max_size=10).map("".join), max_size=4))
def test_many_at_once_are_as_one_by_one(tokenizer: Tokenizer, texts: list[str]) -> None:
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def _strips(content: dict[str, Any]) -> None:
    content["added_tokens"][1]["lstrip"] = True


def _starts(content: dict[str, Any]) -> None:
    content["pre_tokenizer"]["add_prefix_space"] = True


def _prepends(content: dict[str, Any]) -> None:
    content["normalizer"] = {"type": "Prepend", "prepend": "x"}


@pytest.mark.parametrize("change", [_strips, _starts, _prepends])
def test_many_at_once_where_a_text_is_not_the_sum_of_its_parts(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer = Tokenizer(folder)
    texts = [" a <|im_start|> b<|im_end|>\nc", "a<|im_end|> <|im_start|>", " a", "a"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]


def test_cut_keeps_the_start_and_whole_characters(tokenizer: Tokenizer) -> None:
    count = len(tokenizer.encode(TEXT))
    cuts = [tokenizer.truncate(TEXT, tokens) for tokens in range(count + 2)]
    assert cuts[0] == ""
    assert cuts[count:] == [TEXT, TEXT]
    for tokens, cut in enumerate(cuts):
        assert TEXT.startswith(cut)
        assert cut == cut.rstrip()
        assert len(tokenizer.encode(cut)) <= tokens
    assert "Name three colours: rød, 绿色 and" in cuts
    assert cuts == sorted(cuts, key=len)


def test_padding_is_the_end_token_where_there_is_none(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", pad_token=None)
    tokenizer = Tokenizer(folder)
    assert tokenizer.pad_id == tokenizer.end_id == 2


def test_what_a_tokenizer_puts_before_a_text(folder: Path) -> None:
    start = {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    known = {"<|im_start|>": {"id": "<|im_start|>", "ids": [1], "tokens": ["<|im_start|>"]}}
    processor = {"type": "TemplateProcessing", "single": [start, text], "pair": [start, text, text], "special_tokens": known}
    edit(folder / "tokenizer.json", post_processor=processor)
    tokenizer = Tokenizer(folder)
    assert (tokenizer.start_ids, tokenizer.finish_ids) == ((1,), ())
    assert tokenizer.encode("a") == Tokenizer(folder).encode_batch(["a"])[0]
    assert 1 not in tokenizer.encode("a")  # the layout adds it, once


def test_the_fingerprint_is_of_what_texts_mean(tokenizer: Tokenizer, folder: Path) -> None:
    assert Tokenizer(folder).fingerprint == tokenizer.fingerprint
    padding = {"strategy": {"Fixed": 8}, "direction": "Left", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    edit(folder / "tokenizer.json", padding=padding | {"pad_token": "<|pad|>"})
    assert Tokenizer(folder).fingerprint == tokenizer.fingerprint
    assert Tokenizer(folder).encode("a") == tokenizer.encode("a")
    edit(folder / "tokenizer.json", normalizer={"type": "Lowercase"})
    assert Tokenizer(folder).fingerprint != tokenizer.fingerprint


def test_it_travels_by_its_folder(tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.folder == tokenizer.folder
    assert again.encode(TEXT) == tokenizer.encode(TEXT)


def test_what_is_missing_is_said(folder: Path) -> None:
    edit(folder / "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelError, match=r"has no end token \(eos_token\); set one"):
        Tokenizer(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; save"):
        Tokenizer(folder)
