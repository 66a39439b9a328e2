"""The requests and replies of OpenAI's completions and chat completions that are spoken here, and the shape of errors.

What is not in these models is refused by name. `temperature` is 0 where it is not given (OpenAI: 1), so that a reply can be had
again. Two fields are ours: `ignore_eos` goes on past the model's own end, for measuring; `return_token_ids` adds the reply's
ids to a whole reply's choice; `structured_outputs` is vLLM's. Knows nothing of engines, layouts or HTTP.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from apprentice.errors import did_you_mean

MOST_TOP = 20  # best tokens scored beside each token
MOST_CHOICES = 128  # replies that one request may ask for

# Fields of OpenAI's that may be there as long as they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "logit_bias": ({},),
    "store": (False,),
    "tools": ([],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "suffix": ("",),
}


def _encodable(text: str) -> str:
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text holds half of a surrogate pair, which is no character") from error
    return text


Text = Annotated[str, AfterValidator(_encodable)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


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
        retry_after_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.retry_after_s = retry_after_s
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(_Strict):
    include_usage: bool = False


class JsonSchema(_Strict):
    """The `json_schema` of OpenAI's `response_format`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(_Strict):
    """A reply that is JSON: any object, or what a schema allows."""

    type: Literal["json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` is given exactly where the type is `json_schema`")
        return self


class StructuredOutputs(_Strict):
    """vLLM's field for replies of a given form; exactly one of the three."""

    choice: Annotated[list[Text], Field(min_length=1, max_length=1000)] | None = None
    regex: Text | None = None
    json_: dict[str, Any] | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(form is not None for form in (self.choice, self.regex, self.json_)) != 1:
            raise ValueError("give exactly one of `choice`, `regex` and `json`")
        return self


class Asked(_Strict):
    """What all requests may say."""

    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: int | None = None
    stop: Text | Annotated[list[Text], Field(max_length=16)] = []
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    logit_bias: dict[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=-100.0, le=100.0)]] = {}
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
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
        if self.response_format and self.structured_outputs:
            raise ValueError("give `response_format` or `structured_outputs`, not both")
        if self.ignore_eos and (self.response_format or self.structured_outputs):
            raise ValueError("a reply of a given form ends where the form does; leave out `ignore_eos`")
        return self

    @property
    def top(self) -> int | None:
        """So many best tokens are scored beside each token of the reply; None: no scores."""
        return None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(Asked):
    """Raw text (or token ids), continued as it is; several prompts give `n` choices each, in their order."""

    prompt: (
        Text
        | list[TokenId]
        | Annotated[list[Text], Field(max_length=MOST_CHOICES)]
        | Annotated[list[list[TokenId]], Field(max_length=MOST_CHOICES)]
    )
    max_tokens: Annotated[int, Field(ge=0)] | None = 16
    echo: bool = False
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @model_validator(mode="after")
    def _asks_for_something(self) -> Self:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("`max_tokens` 0 asks for nothing but the prompt; set `echo`")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def top(self) -> int | None:
        return self.logprobs


class TextPart(_Strict):
    type: Literal["text"]
    text: Text


class Message(_Strict):
    role: Literal["system", "user", "assistant"]
    content: Text | list[TextPart]

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """A conversation that ends with the user's turn."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0

    @model_validator(mode="after")
    def _scores_fit(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        return self

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None


class InstructRequest(Asked):
    """An instruction and its input, phrased exactly as in training (ours, not OpenAI's)."""

    instruction: Annotated[Text, Field(min_length=1)]
    input: Text = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs


class RenderRequest(_Strict):
    """An instruction and its input, a conversation, or the fields of a task: what the model would read."""

    instruction: Text = ""
    input: Text = ""
    messages: list[Message] | None = None
    task: Text | None = None
    template: Text | None = None
    fields: dict[str, Any] | None = None
    model: Text | None = None

    @model_validator(mode="after")
    def _fields_have_a_task(self) -> Self:
        if self.task is None and (self.fields is not None or self.template is not None):
            raise ValueError("`fields` and `template` are a task's; name it in `task`")
        return self


class TaskRequest(_Strict):
    """A row of a task: its fields, and which of its wordings asks (the first where none is named)."""

    fields: dict[str, Any]
    template: Text | None = None
    model: Text | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None


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

    def choice(
        self, index: int, text: str, finish: str, logprobs: Mapping[str, Any] | None, ids: Sequence[int] | None = None
    ) -> dict[str, Any]:
        """One whole reply, with its token `ids` if given."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice: dict[str, Any] = {"index": index, **said, "finish_reason": finish, "logprobs": logprobs}
        return choice if ids is None else choice | {"token_ids": list(ids)}

    def whole(self, choices: Sequence[Mapping[str, Any]], usage: Usage) -> dict[str, Any]:
        """All replies in one body."""
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self._head, "object": kind, "choices": list(choices), "usage": usage.body()}

    def chunk(
        self, index: int, text: str, finish: str | None, logprobs: Mapping[str, Any] | None = None, *, first: bool = False
    ) -> dict[str, Any]:
        """One piece of a streamed reply; the `first` of a chat names the role."""
        delta = {"role": "assistant", "content": text} if first else ({"content": text} if text else {})
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **said, "finish_reason": finish, "logprobs": logprobs}
        return {**self._head, "object": self._chunk_kind, "choices": [choice]}

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage.body()}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def event(body: Mapping[str, Any]) -> str:
    """One server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


_TYPE = re.compile(r"(list|constrained|function|str$|json-or)")  # what pydantic puts between, where a value may have several types
LAST_EVENT = "data: [DONE]\n\n"


def explain(errors: Sequence[Any], known: Sequence[str]) -> RequestProblem:
    """The first of pydantic's `errors` about a request's body whose fields are `known`, in one sentence."""
    # Where a value may have several types there is one error for each; the deepest says most.
    first = max(errors, key=lambda error: len(error["loc"]) if error["loc"][:2] == errors[0]["loc"][:2] else 0)
    names = [str(part) for part in first["loc"] if part != "body"]
    path = [name for name in names if not (_TYPE.match(name))]
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
