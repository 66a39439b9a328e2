"""Schemas of requests and replies: OpenAI's completions and chat completions, our own requests, and the error body.

Fields that are not in these models are refused by name. `temperature` defaults to 0 (OpenAI: 1), so that replies can be reproduced.
One field is ours: `ignore_eos` goes on past the model's own end, for benchmarks. Two are vLLM's: `return_token_ids` adds the ids of
prompt and reply, `structured_outputs` constrains the reply's form.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import ConfigDict, Field, model_validator

from apprentice.errors import did_you_mean
from apprentice.serve.api.field_types import (
    Biases,
    FormChoice,
    Metadata,
    Name,
    Regex,
    Row,
    Schema,
    Stop,
    Strict,
    Text,
    TokenCount,
    TokenIds,
    few,
)
from apprentice.serve.api.neutral_fields import NEUTRAL, NEUTRAL_STREAM, NEUTRAL_TURN

MOST_TOP = 20  # best tokens scored beside each token
MOST_CHOICES = 128  # replies that one request may ask for
_PROMPT_IDS = "prompt_token_ids"
MOST_MESSAGES = 4096  # messages of a conversation, and parts of one message
_UNUSED = "Accepted and not used."

_TOOL_ROLES = ("tool", "function")


class RequestProblem(Exception):  # noqa: N818 - a fault of the request, sent to the client
    """A refusal of a request: HTTP `status` and error `body` in OpenAI's shape."""

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


class StreamOptions(Strict):
    neutral = NEUTRAL_STREAM
    include_usage: bool = False


class JsonSchema(Strict):
    """The `json_schema` of OpenAI's `response_format`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    name: Name = ""
    description: Text | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """A reply that is JSON: any object, or what a schema allows."""

    type: Literal["json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` is given exactly where the type is `json_schema`")
        return self


class StructuredOutputs(Strict):
    """vLLM's field for constrained replies; exactly one of the three."""

    choice: Annotated[list[FormChoice], few(1000, least=1)] | None = None
    regex: Regex | None = None
    json_: Schema | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(form is not None for form in (self.choice, self.regex, self.json_)) != 1:
            raise ValueError("give exactly one of `choice`, `regex` and `json`")
        return self


class Asked(Strict):
    """Fields that all requests for a generated reply share."""

    neutral = NEUTRAL
    model: Name | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], few(16)] = Field(default_factory=list)
    frequency_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    presence_penalty: Annotated[float, Field(ge=-2.0, le=2.0)] = 0.0
    logit_bias: Biases = Field(default_factory=dict)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_token_ids: bool = False
    user: Text | None = Field(None, description=_UNUSED)
    metadata: Metadata | None = Field(None, description=_UNUSED)
    safety_identifier: Name | None = Field(None, description=_UNUSED)
    prompt_cache_key: Name | None = Field(None, description=_UNUSED)
    prompt_cache_retention: Name | None = Field(None, description=_UNUSED)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise ValueError("`stream_options` are those of a stream; set `stream`: true, or leave them out")
        if self.response_format and self.structured_outputs:
            raise ValueError("give `response_format` or `structured_outputs`, not both")
        if self.ignore_eos and (self.response_format or self.structured_outputs):
            raise ValueError("a reply of a given form ends where the form does; leave out `ignore_eos`")
        return self

    @property
    def streams_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def top(self) -> int | None:
        """How many of the best tokens are scored beside each token of the reply; None: no scores."""
        return None

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(Asked):
    """Raw text or token ids, continued as they are; several prompts give `n` choices each, in their order."""

    prompt: Text | TokenIds | Annotated[list[Text], few(MOST_CHOICES)] | Annotated[list[TokenIds], few(MOST_CHOICES)]
    max_tokens: Annotated[int, Field(ge=0, lt=2**31)] | None = 16
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


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class Message(Strict):
    """A turn of a conversation. `developer` is OpenAI's newer word for `system`. A reply's message may be sent back as a turn."""

    neutral = NEUTRAL_TURN
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], few(MOST_MESSAGES)]
    name: Name | None = Field(None, description=_UNUSED)

    @model_validator(mode="before")
    @classmethod
    def _without_tools(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (
            values.get("role") in _TOOL_ROLES or values.get("tool_calls") or values.get("function_call")
        ):
            raise ValueError("tools are not supported here, so their calls and results cannot be read; leave such messages out")
        return values

    @property
    def speaker(self) -> str:
        """The role as chat templates name it."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(Asked):
    """A conversation that ends with the user's turn."""

    messages: Annotated[list[Message], few(MOST_MESSAGES, least=1)]
    max_completion_tokens: TokenCount | None = None
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
    """An instruction and its input, in exactly the prompt format of training (ours, not OpenAI's)."""

    instruction: Annotated[Text, Field(min_length=1)]
    input: Text = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def top(self) -> int | None:
        return self.logprobs


class RenderRequest(Strict):
    """An instruction and its input, a conversation, or a task's fields; the reply is the prompt that the model would read."""

    instruction: Text = ""
    input: Text = ""
    messages: Annotated[list[Message], few(MOST_MESSAGES)] | None = None
    task: Name | None = None
    template: Name | None = None
    fields: Row | None = None
    model: Name | None = None

    @model_validator(mode="after")
    def _fields_have_a_task(self) -> Self:
        if self.task is None and (self.fields is not None or self.template is not None):
            raise ValueError("`fields` and `template` are a task's; name it in `task`")
        return self


class TaskRequest(Strict):
    """A row of a task: its fields, and the template that asks (default: the first)."""

    fields: Row
    template: Name | None = None
    model: Name | None = None
    max_tokens: TokenCount | None = None


@dataclass(frozen=True)
class Usage:
    """Prompt tokens and produced tokens, the end token included; `cached` prompt tokens came from the KV cache."""

    prompt: int
    completion: int
    cached: int = 0

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


class Ids(NamedTuple):
    """Token ids of a choice, or of a piece of one, for `return_token_ids`; the prompt's come once."""

    prompt: Sequence[int] | None
    reply: Sequence[int]


class Replies:
    """Builds the response bodies for one request, whole or in chunks. `chat` chooses between OpenAI's two shapes."""

    def __init__(self, model: str, *, chat: bool) -> None:
        self.chat = chat
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": model,
        }

    def choice(
        self, index: int, text: str, finish: str, logprobs: Mapping[str, Any] | None, ids: Ids | None = None
    ) -> dict[str, Any]:
        """One whole choice, with its token `ids`, if any, in vLLM's fields."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": index, **said, "finish_reason": finish, "logprobs": logprobs, **_fields(ids)}

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage) -> dict[str, Any]:
        """The body with all choices."""
        kind = "chat.completion" if self.chat else "text_completion"
        return self._with_prompt({**self._head, "object": kind, "choices": list(choices), "usage": usage.body()})

    def chunk(
        self,
        index: int,
        text: str,
        finish: str | None,
        logprobs: Mapping[str, Any] | None = None,
        *,
        first: bool = False,
        ids: Ids | None = None,
    ) -> dict[str, Any]:
        """The body of one piece of a streamed reply; the `first` of a chat names the role."""
        delta = {"role": "assistant", "content": text} if first else ({"content": text} if text else {})
        said = {"delta": delta} if self.chat else {"text": text}
        choice = {"index": index, **said, "finish_reason": finish, "logprobs": logprobs, **_fields(ids)}
        return self._with_prompt({**self._head, "object": self._chunk_kind, "choices": [choice]})

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        return {**self._head, "object": self._chunk_kind, "choices": [], "usage": usage.body()}

    def _with_prompt(self, body: dict[str, Any]) -> dict[str, Any]:
        """Moves the prompt's ids of a chat from the choices to the body, because a chat has one prompt."""
        ids = [choice.pop(_PROMPT_IDS, None) for choice in body["choices"]] if self.chat else []
        return body | {_PROMPT_IDS: ids[0]} if ids and ids[0] is not None else body

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.chat else "text_completion"


def _fields(ids: Ids | None) -> dict[str, Any]:
    if ids is None:
        return {}
    prompt = {} if ids.prompt is None else {_PROMPT_IDS: list(ids.prompt)}
    return prompt | {"token_ids": list(ids.reply)}


def event(body: Mapping[str, Any]) -> str:
    """`body` as one server-sent event."""
    return f"data: {json.dumps(body, ensure_ascii=False, separators=(',', ':'))}\n\n"


# Type names that pydantic puts between keys where a value may have several types. Keys named `functions` or `list` do not match.
_TYPE = re.compile(r"(list\[|constrained-|function-\w+\[|str$|json-or)")
LAST_EVENT = "data: [DONE]\n\n"


def explain(errors: Sequence[Any], known: Sequence[str]) -> RequestProblem:
    """The most telling of pydantic's `errors` about a request's body, in one sentence; `known` are the body's fields."""
    # Where a value may have several types there is an error for each; the deepest says most.
    first = max(errors, key=lambda error: len(error["loc"]) if error["loc"][:2] == errors[0]["loc"][:2] else 0)
    names = [str(part) for part in first["loc"] if part != "body"]
    unknown = first["type"] == "extra_forbidden"  # then the last part is a key, whatever it looks like
    path = [name for place, name in enumerate(names) if (unknown and place == len(names) - 1) or not _TYPE.match(name)]
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return RequestProblem(f"the body is not JSON: {first['ctx']['error']}.")
    if unknown and len(path) == 1:
        near = did_you_mean(path[0], known)
        return RequestProblem(
            f"`{path[0]}` is not supported here.{near} Supported: {', '.join(known)}.", param=param, code="unsupported_parameter"
        )
    message = str(first["msg"]).removeprefix("Value error, ")
    return RequestProblem(f"`{param}`: {message}." if param else f"the body: {message}.", param=param, code=first["type"])
