"""Schemas of response bodies: OpenAI's completions and chat completions, whole and in chunks, with vLLM's fields for token ids.

A field that was not set is left out of the body; one that was set to None is there as `null`. The fields' order is the bodies'.
"""

from __future__ import annotations

import json
from typing import Any, Literal, Self

from pydantic import BaseModel

LAST_EVENT = "data: [DONE]\n\n"


class ResponseBody(BaseModel):
    """Base class of response bodies and their parts."""

    def to_dict(self) -> dict[str, Any]:
        """The body as JSON values, without the fields that were not set."""
        return self.model_dump(exclude_unset=True)

    def to_event(self) -> str:
        """The body as one server-sent event."""
        return event(self.to_dict())


def event(body: dict[str, Any]) -> str:
    """`body` as one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


class PromptTokensDetails(ResponseBody):
    """`cached_tokens` of the prompt came from the KV cache."""

    cached_tokens: int


class CompletionTokensDetails(ResponseBody):
    """`reasoning_tokens` of the replies are their thoughts, with the texts around them."""

    reasoning_tokens: int


class Usage(ResponseBody):
    """Prompt tokens and produced tokens, the end token included."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | None = None

    @classmethod
    def of(cls, prompt: int, completion: int, cached: int = 0, thoughts: int = 0) -> Self:
        """The usage of `prompt` and `completion` tokens, `cached` of the prompt's from the KV cache, `thoughts` of the replies'."""
        more = {"completion_tokens_details": CompletionTokensDetails(reasoning_tokens=thoughts)} if thoughts else {}
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            **more,
        )


class CompletionLogprobs(ResponseBody):
    """`logprobs` of a completion: four lists, one entry for each token; `text_offset` is counted in characters."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class TopLogprob(ResponseBody):
    """A token of a chat's reply, or one that was nearly chosen, with its log-probability and the bytes of its text."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TopLogprob):
    """A token of a chat's reply, and the best tokens in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(ResponseBody):
    """`logprobs` of a chat."""

    content: list[ChatTokenLogprob]
    refusal: None


class CompletionChoice(ResponseBody):
    """One choice of a completion, whole or the next part of it."""

    index: int
    text: str
    finish_reason: str | None
    logprobs: CompletionLogprobs | None
    prompt_token_ids: list[int] = []
    token_ids: list[int] = []


class Completion(ResponseBody):
    """Body of a completion, whole or one chunk of a stream."""

    id: str
    created: int
    model: str
    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class CalledFunction(ResponseBody):
    """A function that the model calls, and its arguments as JSON."""

    name: str
    arguments: str


class FunctionCall(ResponseBody):
    """A call; its result is sent back under its `id`."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class FunctionDelta(ResponseBody):
    """The function of a call, or the next part of its arguments."""

    name: str = ""
    arguments: str = ""


class CallDelta(ResponseBody):
    """The next part of the call number `index`; its first part has the id."""

    index: int
    id: str = ""
    type: Literal["function"] = "function"
    function: FunctionDelta


class ChatMessage(ResponseBody):
    """The message of a whole reply; `content` is null beside calls alone, `reasoning_content` is the thought."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str = ""
    tool_calls: list[FunctionCall] = []


class ChatDelta(ResponseBody):
    """The next part of a reply's message; the first part names the role."""

    role: Literal["assistant"] = "assistant"
    content: str | None = ""
    reasoning_content: str = ""
    tool_calls: list[CallDelta] = []


class ChatChoice(ResponseBody):
    """One whole choice of a chat completion."""

    index: int
    message: ChatMessage
    finish_reason: str | None
    logprobs: ChatLogprobs | None
    token_ids: list[int] = []


class ChatChunkChoice(ResponseBody):
    """The next part of one choice of a chat completion."""

    index: int
    delta: ChatDelta
    finish_reason: str | None
    logprobs: ChatLogprobs | None
    token_ids: list[int] = []


class ChatCompletion(ResponseBody):
    """Body of a chat completion."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] = []


class ChatCompletionChunk(ResponseBody):
    """Body of one chunk of a streamed chat completion."""

    id: str
    created: int
    model: str
    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    prompt_token_ids: list[int] = []
    usage: Usage | None = None
