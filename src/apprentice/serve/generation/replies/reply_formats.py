"""Response bodies of a generated reply in OpenAI's two shapes, one class for each: completions and chats."""

from __future__ import annotations

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

from apprentice.inference.generation_request import ScoredToken
from apprentice.pretrained.replies.reply_parser import ReplyDelta
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.serve.api.schemas.responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatMessage,
    Completion,
    CompletionChoice,
    Usage,
)
from apprentice.serve.generation.replies.logprobs import chat_logprobs, completion_logprobs
from apprentice.serve.generation.replies.reply_parts import delta_of, message_of


class ChoiceTokens(NamedTuple):
    """Tokens of a choice, or of a chunk of one, as far as the request asks for them.

    `scores` and their `offsets` in the choice's text are None without `logprobs`; `ids` are None without `return_token_ids`;
    `prompt_ids` come once for each choice, with its first ids.
    """

    scores: Sequence[ScoredToken] | None = None
    offsets: Sequence[int] = ()
    ids: Sequence[int] | None = None
    prompt_ids: Sequence[int] | None = None


class WholeReply(NamedTuple):
    """A whole choice; `parts` are those of a chat's reply that is read, whose `text` they are."""

    text: str
    finish: str
    tokens: ChoiceTokens
    parts: Sequence[ReplyDelta] | None = None


class ReplyFormat(ABC):
    """Builds the bodies of one request to the model that clients know as `model`."""

    scores_end_token: ClassVar[bool]  # whether the end token is among the scores
    _id_prefix: ClassVar[str]

    def __init__(self, model: str, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._head: dict[str, Any] = {
            "id": f"{self._id_prefix}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def whole(self, choices: Sequence[WholeReply], usage: Usage) -> Completion | ChatCompletion:
        """The body with all `choices`."""

    @abstractmethod
    def chunk(
        self, index: int, text: str, finish: str | None, tokens: ChoiceTokens, *, is_first: bool = False
    ) -> Completion | ChatCompletionChunk:
        """The body of the next part of the choice `index`."""

    @abstractmethod
    def usage_chunk(self, usage: Usage) -> Completion | ChatCompletionChunk:
        """The last body of a stream, without choices."""


class CompletionFormat(ReplyFormat):
    """Bodies of `/v1/completions` and `/v1/instruct`."""

    scores_end_token = True
    _id_prefix = "cmpl"

    def whole(self, choices: Sequence[WholeReply], usage: Usage) -> Completion:
        """The body of a completion with all `choices`."""
        return self._body([self._choice(index, *choice[:3]) for index, choice in enumerate(choices)], {"usage": usage})

    def chunk(self, index: int, text: str, finish: str | None, tokens: ChoiceTokens, *, is_first: bool = False) -> Completion:
        """The body of the next part of a completion."""
        return self._body([self._choice(index, text, finish, tokens)], {})

    def usage_chunk(self, usage: Usage) -> Completion:
        """The last body of a streamed completion."""
        return self._body([], {"usage": usage})

    def _body(self, choices: list[CompletionChoice], more: Mapping[str, Any]) -> Completion:
        return Completion(**self._head, object="text_completion", choices=choices, **more)

    def _choice(self, index: int, text: str, finish: str | None, tokens: ChoiceTokens) -> CompletionChoice:
        scores = tokens.scores
        logprobs = None if scores is None else completion_logprobs(scores, self._tokenizer, tokens.offsets)
        ids = _ids(token_ids=tokens.ids, prompt_token_ids=tokens.prompt_ids)
        return CompletionChoice(index=index, text=text, finish_reason=finish, logprobs=logprobs, **ids)


class ChatFormat(ReplyFormat):
    """Bodies of `/v1/chat/completions`. A chat has one prompt, so its ids are the body's and not each choice's."""

    scores_end_token = False
    _id_prefix = "chatcmpl"

    def whole(self, choices: Sequence[WholeReply], usage: Usage) -> ChatCompletion:
        """The body of a chat completion with all `choices`."""
        prompt_ids = choices[0].tokens.prompt_ids
        return ChatCompletion(
            **self._head,
            object="chat.completion",
            choices=[
                ChatChoice(
                    index=index,
                    message=ChatMessage(role="assistant", content=one.text) if one.parts is None else message_of(one.parts),
                    finish_reason=one.finish,
                    **self._details(one.tokens),
                )
                for index, one in enumerate(choices)
            ],
            usage=usage,
            **_ids(prompt_token_ids=prompt_ids),
        )

    def chunk(
        self, index: int, text: str, finish: str | None, tokens: ChoiceTokens, *, is_first: bool = False
    ) -> ChatCompletionChunk:
        """The body of the next part of a chat completion."""
        role: dict[str, Any] = {"role": "assistant"} if is_first else {}
        content: dict[str, Any] = {"content": text} if is_first or text else {}
        choice = ChatChunkChoice(index=index, delta=ChatDelta(**role, **content), finish_reason=finish, **self._details(tokens))
        return self._chunk([choice], _ids(prompt_token_ids=tokens.prompt_ids))

    def part_chunk(self, index: int, part: ReplyDelta, tokens: ChoiceTokens) -> ChatCompletionChunk:
        """The body of the next part of a reply that is read."""
        choice = ChatChunkChoice(index=index, delta=delta_of(part), finish_reason=None, **self._details(tokens))
        return self._chunk([choice], _ids(prompt_token_ids=tokens.prompt_ids))

    def usage_chunk(self, usage: Usage) -> ChatCompletionChunk:
        """The last body of a streamed chat completion."""
        return self._chunk([], {"usage": usage})

    def _chunk(self, choices: list[ChatChunkChoice], more: Mapping[str, Any]) -> ChatCompletionChunk:
        return ChatCompletionChunk(**self._head, object="chat.completion.chunk", choices=choices, **more)

    def _details(self, tokens: ChoiceTokens) -> dict[str, Any]:
        logprobs = None if tokens.scores is None else chat_logprobs(tokens.scores, self._tokenizer)
        return {"logprobs": logprobs, **_ids(token_ids=tokens.ids)}


def _ids(**fields: Sequence[int] | None) -> dict[str, Any]:
    """vLLM's fields for token ids, those that are not None."""
    return {name: list(ids) for name, ids in fields.items() if ids is not None}
