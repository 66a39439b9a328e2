"""Bodies have OpenAI's shape, with vLLM's fields for token ids."""

from __future__ import annotations

import json
from pathlib import Path

from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.api.schemas.responses import Usage
from apprentice.serve.generation.replies.reply_formats import ChatFormat, ChoiceTokens, CompletionFormat, WholeReply


def test_bodies_have_openais_shape(tiny_model: Path) -> None:
    tokenizer = Tokenizer(tiny_model)
    chat, text = ChatFormat("m", tokenizer), CompletionFormat("m", tokenizer)
    usage, ids = Usage.of(3, 2), ChoiceTokens(ids=[7, 8], prompt_ids=[5])
    whole = chat.whole([WholeReply("Hi", "stop", ChoiceTokens())], usage).to_dict()
    assert whole["object"] == "chat.completion"
    assert whole["choices"] == [
        {"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop", "logprobs": None}
    ]
    counts = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
    assert whole["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 0}}
    (choice,) = text.whole([WholeReply("Hi", "length", ids)], usage).to_dict()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == ([5], [7, 8])
    with_ids = chat.whole([WholeReply("Hi", "stop", ids)], usage).to_dict()
    assert (with_ids["prompt_token_ids"], with_ids["choices"][0]["token_ids"]) == ([5], [7, 8])
    assert "prompt_token_ids" not in with_ids["choices"][0]
    first = chat.chunk(0, "H", None, ChoiceTokens(), is_first=True)
    last = chat.chunk(1, "", "stop", ChoiceTokens()).to_dict()
    assert first.to_dict()["choices"][0]["delta"] == {"role": "assistant", "content": "H"}
    assert (last["choices"][0]["delta"], last["choices"][0]["finish_reason"]) == ({}, "stop")
    assert text.chunk(0, "H", None, ChoiceTokens()).to_dict()["choices"][0]["text"] == "H"
    assert chat.usage_chunk(usage).to_dict()["choices"] == []
    assert json.loads(first.to_event().removeprefix("data: ")) == first.to_dict()
