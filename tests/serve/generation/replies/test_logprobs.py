"""Log-probabilities as OpenAI's clients read them."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice.inference.generation_request import ScoredToken
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.generation.replies.logprobs import chat_logprobs, completion_logprobs


@pytest.fixture(scope="module")
def tokenizer(tiny_model: Path) -> Tokenizer:
    return Tokenizer(tiny_model)


def test_the_token_that_was_said_is_among_the_best(tokenizer: Tokenizer) -> None:
    said, best, other = tokenizer.encode("a")[0], tokenizer.encode("b")[0], tokenizer.encode("c")[0]
    scores = [
        ScoredToken(said, -5.0, ((best, -0.5), (other, -1.0))),
        ScoredToken(best, -0.5, ((best, -0.5), (other, -1.0))),
        ScoredToken(said, -5.0),
    ]
    completion = completion_logprobs(scores, tokenizer, [0, 1, 2])
    assert completion.top_logprobs == [{"b": -0.5, "c": -1.0, "a": -5.0}, {"b": -0.5, "c": -1.0}, {"a": -5.0}]
    first, second, third = chat_logprobs(scores, tokenizer).content
    assert [(each.token, each.logprob) for each in first.top_logprobs] == [("b", -0.5), ("c", -1.0), ("a", -5.0)]
    assert [each.token for each in second.top_logprobs] == ["b", "c"]
    assert third.top_logprobs == []  # nobody asked for the best


def test_parts_of_characters_keep_their_bytes(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("🚀")
    assert len(ids) == 4
    scores = [ScoredToken(id, -1.0, ((id, -1.0),)) for id in ids]
    tokens = completion_logprobs(scores, tokenizer, [0] * 4).tokens
    assert tokens == ["bytes:\\xf0", "bytes:\\x9f", "bytes:\\x9a", "bytes:\\x80"]
    content = chat_logprobs(scores, tokenizer).content
    assert [entry.token for entry in content] == ["\\xf0", "\\x9f", "\\x9a", "\\x80"]
    assert bytes(byte for entry in content for byte in entry.bytes).decode() == "🚀"
    assert bytes(byte for entry in content for byte in entry.top_logprobs[0].bytes).decode() == "🚀"
