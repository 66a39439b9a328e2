"""The requests and replies of OpenAI's completions and chat completions that are spoken here, and the shape of errors.

What is not in these models is refused by name. `temperature` is 0 where it is not given (OpenAI: 1), so that a reply can be had
again. Two fields are ours: `ignore_eos` goes on past the model's own end, for measuring; `return_token_ids` adds the reply's
ids to a whole reply's choice. Knows nothing of engines, layouts or HTTP.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from apprentice.errors import did_you_mean

# Fields of OpenAI's that may be there as long as they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),
    "echo": (False,),
    "store": (False,),
    "tools": ([],),
    "response_format": ({"type": "text"},),
}


class RequestProblem(Exception):  # noqa: N818 - it is the client's, and becomes an answer
    """Why a request is not served, as OpenAI's clients expect to read it."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        kind: str = "invalid_request_error",
    ) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class Asked(_Strict):
    """What all requests may say."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    ignore_eos: bool = False
    return_token_ids: bool = False
    user: str | None = Field(None, description="Accepted and not used.")

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {key: value for key, value in values.items() if value is not None and value not in _NEUTRAL.get(str(key), ())}

    @model_validator(mode="after")
    def _ids_come_whole(self) -> Self:
        if self.return_token_ids and self.stream:
            raise ValueError("`return_token_ids` is for whole replies; leave out `stream`")
        return self

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(Asked):
    """Raw text (or token ids), continued as it is."""

    prompt: str | list[Annotated[int, Field(ge=0)]]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: str | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """A conversation that ends with the user's turn."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None


class InstructRequest(Asked):
    """An instruction and its input, phrased exactly as in training (ours, not OpenAI's)."""

    instruction: Annotated[str, Field(min_length=1)]
    input: str = ""


@dataclass(frozen=True)
class Usage:
    """Tokens read and tokens produced, the end token included."""

    prompt: int
    completion: int

    def body(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


class Replies:
    """Builds the bodies of one reply: whole, or in chunks. `chat` chooses between OpenAI's two shapes."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def whole(self, text: str, finish: str, usage: Usage, ids: Sequence[int] | None = None) -> dict[str, Any]:
        """The reply in one body, with its token `ids` if given."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice: dict[str, Any] = {"index": 0, **said, "finish_reason": finish, "logprobs": None}
        if ids is not None:
            choice["token_ids"] = list(ids)
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": usage.body()}

    def chunk(self, text: str, finish: str | None, *, first: bool = False) -> dict[str, Any]:
        """One piece of a streamed reply; the `first` of a chat names the role."""
        delta = {"role": "assistant", "content": text} if first else ({"content": text} if text else {})
        choice = {"index": 0, **({"delta": delta} if self.chat else {"text": text}), "finish_reason": finish, "logprobs": None}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage.body()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def event(body: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


LAST_EVENT = "data: [DONE]\n\n"


def explain(errors: Sequence[Any], known: Sequence[str]) -> RequestProblem:
    """The first of pydantic's `errors` about a request's body whose fields are `known`, in one sentence."""
    # Where a value may have several types there is one error for each; the deepest says most.
    first = max(errors, key=lambda error: len(error["loc"]) if error["loc"][:2] == errors[0]["loc"][:2] else 0)
    names = [str(part) for part in first["loc"] if part != "body"]
    path = [name for name in names if not (name.startswith("list[") or name in ("str", "constrained-str"))]
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return RequestProblem(f"the body is not JSON: {first['ctx']['error']}.")
    if first["type"] == "extra_forbidden" and len(path) == 1:
        near = did_you_mean(path[0], known)
        return RequestProblem(
            f"`{path[0]}` is not supported here.{near} Supported: {', '.join(known)}.", param=param, code="unsupported_parameter"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    return RequestProblem(f"`{param}`: {message}." if param else f"the body: {message}.", param=param, code=first["type"])
