"""Texts encoded part by part have the ids of the whole, whatever rules the tokenizer parts words by."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from apprentice.pretrained import segment_cache as passages
from apprentice.pretrained.segment_cache import SegmentCache

SPECIAL = AddedToken("<|end|>", special=True, normalized=False)
GPT2 = r"'(?:s|t)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LINES = [
    "The film was fine.",
    "Was it?",
    "yes",
    "",
    " indented",
    "7 of 10",
    "“quoted”",
    "- a list",
    "ends in a space ",
    "One. Two. Three.",
    "<|end|>",
]


def trained(rule: str | pre_tokenizers.PreTokenizer | None) -> Tokenizer:
    """A BPE tokenizer that parts words by `rule`; bytes are its letters if that is a pattern."""
    tokenizer = Tokenizer(models.BPE())
    if isinstance(rule, str):
        letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        rule = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(rule), "isolated"), letters])
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.pre_tokenizer = rule
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=[SPECIAL], show_progress=False)
    tokenizer.train_from_iterator([f"{a}\n\n{b}\n{a}.\r\n\n" for a, b in product(LINES, LINES)], trainer)
    return tokenizer


@pytest.fixture(scope="module", params=[GPT2, LLAMA3], ids=["gpt2", "llama3"])
def backend(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def whole(backend: Tokenizer, texts: list[str]) -> list[list[int]]:
    return [backend.encode(text, add_special_tokens=False).ids for text in texts]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from([*LINES, "\n", "\n\n", "\r\n"]), max_size=8).map("".join), max_size=4))
def test_ids_are_those_of_the_whole_text(backend: Tokenizer, texts: list[str]) -> None:
    assert SegmentCache(backend, [SPECIAL]).encode(texts) == whole(backend, texts)


@pytest.mark.parametrize(
    ("pattern", "parts"), [(GPT2, ["One.\n", "\nTwo."]), (LLAMA3, ["One.\n\n", "Two."])], ids=["gpt2", "llama3"]
)
def test_a_blank_line_parts_a_text_where_the_tokenizer_does(pattern: str, parts: list[str]) -> None:
    texts: list[str] = []
    SegmentCache(Spy(trained(pattern), texts), [SPECIAL]).encode(["One.\n\nTwo."])
    assert texts == parts


def test_a_passage_is_encoded_once() -> None:
    texts: list[str] = []
    spied = SegmentCache(Spy(trained(GPT2), texts), [SPECIAL])
    spied.encode(["One.\n\nTwo.", "One.\n\nThree."])
    spied.encode(["Four.\n\nTwo."])
    assert texts == ["One.\n", "\nTwo.", "\nThree.", "Four.\n"]


def test_what_did_not_come_again_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(passages, "REMEMBERED_TOKENS", 1)
    texts: list[str] = []
    spied = SegmentCache(Spy(trained(GPT2), texts), [SPECIAL])
    for text in ["Was it?", "yes", "Was it?", "7 of 10", "yes"]:
        spied.encode([text])
    assert texts == ["Was it?", "yes", "7 of 10", "yes"]


@pytest.mark.parametrize(
    ("rule", "parts"),
    [
        (pre_tokenizers.Metaspace(prepend_scheme="first"), ["One.\n\nTwo.<|end|>Three."]),
        (None, ["One.\n\nTwo.", "<|end|>", "Three."]),
    ],
    ids=["the start of a text is apart", "no words"],
)
def test_texts_stay_whole_where_parts_would_be_encoded_otherwise(
    rule: pre_tokenizers.PreTokenizer | None, parts: list[str]
) -> None:
    backend = trained(rule)
    seen: list[str] = []
    texts = ["One.\n\nTwo.<|end|>Three."]
    assert SegmentCache(Spy(backend, seen), [SPECIAL]).encode(texts) == whole(backend, texts)
    assert seen == parts


class Spy:
    """A tokenizer that writes down which texts it encodes in batches."""

    def __init__(self, backend: Tokenizer, texts: list[str]) -> None:
        self.backend = backend
        self.seen = texts

    @property
    def pre_tokenizer(self) -> pre_tokenizers.PreTokenizer:
        return self.backend.pre_tokenizer

    def encode(self, text: str, add_special_tokens: bool) -> object:
        return self.backend.encode(text, add_special_tokens=add_special_tokens)

    def encode_batch_fast(self, texts: list[str], add_special_tokens: bool) -> object:
        self.seen += texts
        return self.backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
