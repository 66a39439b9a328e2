"""Schemas of request bodies: OpenAI's completions and chat completions, and our own.

Fields that are not in these models are refused by name. `temperature` defaults to 0 (OpenAI: 1), so that replies can be reproduced.
One field is ours: `ignore_eos` goes on past the model's own end, for benchmarks. Three are vLLM's: `return_token_ids` adds the ids
of prompt and reply, `structured_outputs` constrains the reply's form, `thinking_token_budget` is the most tokens of a thought.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import ConfigDict, Field, model_validator

from apprentice.serve.api.schemas.field_types import (
    Biases,
    ChoiceText,
    Metadata,
    Name,
    Regex,
    Row,
    Schema,
    Stop,
    StrictFields,
    Text,
    TokenCount,
    TokenIds,
    bounded_list,
)
from apprentice.serve.api.schemas.neutral_fields import NEUTRAL, NEUTRAL_CHAT, NEUTRAL_STREAM, NEUTRAL_TURN
from apprentice.serve.api.schemas.tools import MOST_SCHEMA_CHARACTERS, MOST_TOOLS, CallOfTurn, NamedTool, Tool, ToolChoice

MOST_TOP = 20  # best tokens scored beside each token
MOST_CHOICES = 128  # replies that one request may ask for
MOST_MESSAGES = 4096  # messages of a conversation, and parts of one message
_MANY = bounded_list(MOST_CHOICES)
_UNUSED = "Accepted and not used."


class StreamOptions(StrictFields):
    """OpenAI's `stream_options`."""

    neutral = NEUTRAL_STREAM
    include_usage: bool = False


class JsonSchema(StrictFields):
    """The `json_schema` of OpenAI's `response_format`."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
    name: Name = ""
    description: Text | None = None
    schema_: Schema = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictFields):
    """A reply that is JSON: any object, or what a schema allows."""

    type: Literal["json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_its_schema(self) -> Self:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("`json_schema` is given exactly where the type is `json_schema`")
        return self


class StructuredOutputs(StrictFields):
    """vLLM's field for constrained replies; exactly one of the three."""

    choice: Annotated[list[ChoiceText], bounded_list(1000, least=1)] | None = None
    regex: Regex | None = None
    json_: Schema | None = Field(None, alias="json")

    @model_validator(mode="after")
    def _is_one(self) -> Self:
        if sum(form is not None for form in (self.choice, self.regex, self.json_)) != 1:
            raise ValueError("give exactly one of `choice`, `regex` and `json`")
        return self


class GenerationFields(StrictFields):
    """Fields that all requests for a generated reply share."""

    neutral = NEUTRAL
    model: Name | None = None
    max_tokens: TokenCount | None = None
    temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Stop | Annotated[list[Stop], bounded_list(16)] = Field(default_factory=list)
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
    def is_constrained(self) -> bool:
        """Whether the reply must follow a grammar."""
        return self.response_format is not None or self.structured_outputs is not None

    @property
    def streams_usage(self) -> bool:
        """Whether the last chunk of the stream has the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def scored_tokens(self) -> int | None:
        """How many of the best tokens are scored beside each token of the reply; None: no scores."""
        return None

    @property
    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(GenerationFields):
    """Raw text or token ids, continued as they are; several prompts give `n` choices each, in their order."""

    prompt: Text | TokenIds | Annotated[list[Text], _MANY] | Annotated[list[TokenIds], _MANY]
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
        """The prompts as a list, each a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]

    @property
    def scored_tokens(self) -> int | None:
        """How many of the best tokens are scored beside each token: `logprobs`."""
        return self.logprobs


class TextPart(StrictFields):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class Message(StrictFields):
    """A turn of a conversation. `developer` is OpenAI's newer word for `system`. A reply's message may be sent back as a turn.

    A turn of the assistant may have `tool_calls`, and each of them is answered by a turn with the role `tool`.
    """

    neutral = NEUTRAL_TURN
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Text | Annotated[list[TextPart], bounded_list(MOST_MESSAGES)] = ""
    name: Name | None = Field(None, description=_UNUSED)
    reasoning_content: Text | None = Field(None, description="The thought of an assistant's turn.")
    tool_calls: Annotated[list[CallOfTurn], bounded_list(MOST_TOOLS)] | None = None
    tool_call_id: Name | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_old_calls(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and (values.get("role") == "function" or values.get("function_call")):
            raise ValueError("`function_call` and the role `function` are OpenAI's old form; send `tool_calls` and the role `tool`")
        return values

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        if self.role != "assistant" and (self.tool_calls or self.reasoning_content is not None):
            raise ValueError(f"`tool_calls` and `reasoning_content` are the assistant's, and this turn is the {self.role}'s")
        if (self.role == "tool") != (self.tool_call_id is not None):
            raise ValueError(
                "`tool_call_id` is given exactly where the role is `tool`: it names the call that the result belongs to"
            )
        if "content" not in self.model_fields_set and not self.tool_calls:
            raise ValueError("`content` is missing; only a turn with `tool_calls` goes without")
        return self

    @property
    def speaker(self) -> str:
        """The role as chat templates name it."""
        return "system" if self.role == "developer" else self.role

    @property
    def text(self) -> str:
        """The content as one text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    @property
    def turn(self) -> dict[str, Any]:
        """The turn as chat templates read it."""
        more: dict[str, Any] = {"reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        more["tool_calls"] = [call.model_dump() for call in self.tool_calls] if self.tool_calls else None
        return {"role": self.speaker, "content": self.text} | {key: value for key, value in more.items() if value is not None}


Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]  # OpenAI's words
EFFORTS: tuple[str, ...] = get_args(Effort)[1:]  # those that a chat template may read


class TemplateVariables(StrictFields):
    """vLLM's `chat_template_kwargs`, those that are known here: whether a reply begins with a thought, and how much it thinks."""

    enable_thinking: bool | None = None
    reasoning_effort: Effort | None = None


class ChatRequest(GenerationFields):
    """A conversation that ends with the user's turn, or with a result of a call."""

    neutral = NEUTRAL_CHAT
    messages: Annotated[list[Message], bounded_list(MOST_MESSAGES, least=1)]
    tools: Annotated[list[Tool], bounded_list(MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: ToolChoice = "auto"
    chat_template_kwargs: TemplateVariables | None = None
    reasoning_effort: Effort | None = Field(None, description="As in `chat_template_kwargs`.")
    thinking_token_budget: Annotated[int, Field(ge=0, lt=2**31)] | None = None
    parallel_tool_calls: bool = True
    max_completion_tokens: TokenCount | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] = 0

    @model_validator(mode="after")
    def _choice_fits(self) -> Self:
        names = [tool.function.name for tool in self.tools]
        if len(set(names)) < len(names):
            raise ValueError("two functions in `tools` have the same name; a call could mean either")
        if sum(len(json.dumps(tool.function.parameters)) for tool in self.tools) > MOST_SCHEMA_CHARACTERS:
            raise ValueError(
                f"the schemas of `tools` have more than {MOST_SCHEMA_CHARACTERS} characters together as JSON; send fewer functions"
            )
        if self.must_call and not self.tools:
            raise ValueError("`tool_choice` asks for a call, and there are no `tools`; give them, or leave it out")
        if isinstance(self.tool_choice, NamedTool) and self.tool_choice.function.name not in names:
            raise ValueError(
                f"`tool_choice` names the function {self.tool_choice.function.name!r}, and `tools` has {', '.join(names)}"
            )
        contradiction = next((key for key in ("response_format", "structured_outputs", "ignore_eos") if getattr(self, key)), None)
        if contradiction is not None and self.offered_tools:
            raise ValueError(
                f"`{contradiction}` and functions that may be called contradict each other; leave one of them out, or set"
                ' `tool_choice` to "none"'
            )
        if self.must_call and self.stops:
            raise ValueError("`stop` could cut a call that `tool_choice` asks for; leave it out")
        return self

    @model_validator(mode="after")
    def _results_have_calls(self) -> Self:
        waiting: set[str] = set()
        for place, message in enumerate(self.messages):
            if message.role != "tool":
                waiting = {call.id for call in message.tool_calls or ()}
            elif message.tool_call_id not in waiting:
                raise ValueError(
                    f"`messages.{place}` is the result of the call {message.tool_call_id!r}, which no turn before it made;"
                    " send the assistant's turn with its `tool_calls` first"
                )
            waiting -= {str(message.tool_call_id)}
        return self

    @property
    def enables_thinking(self) -> bool | None:
        """Whether the reply may begin with a thought; None: as the model was trained."""
        return None if self.chat_template_kwargs is None else self.chat_template_kwargs.enable_thinking

    @property
    def effort(self) -> str | None:
        """How much the reply is to think, in the chat template's words; None: as the template does by itself."""
        inner = None if self.chat_template_kwargs is None else self.chat_template_kwargs.reasoning_effort
        return self.reasoning_effort or inner

    @property
    def must_call(self) -> bool:
        """Whether the reply has to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedTool)

    @property
    def offered_tools(self) -> list[dict[str, Any]]:
        """The functions that the reply may call, as chat templates read them; none if `tool_choice` is `none`."""
        return [] if self.tool_choice == "none" else [tool.shown for tool in self.tools]

    @property
    def callable_tools(self) -> list[Tool]:
        """The functions that the reply may call; one if `tool_choice` names it."""
        if isinstance(self.tool_choice, NamedTool):
            return [tool for tool in self.tools if tool.function.name == self.tool_choice.function.name]
        return [] if self.tool_choice == "none" else self.tools

    @model_validator(mode="after")
    def _scores_fit(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("`top_logprobs` needs `logprobs`: true")
        return self

    @property
    def scored_tokens(self) -> int | None:
        """How many of the best tokens are scored beside each token: `top_logprobs`, if `logprobs` is true."""
        return self.top_logprobs if self.logprobs else None


class InstructRequest(GenerationFields):
    """An instruction and its input, in exactly the prompt format of training (ours, not OpenAI's)."""

    instruction: Annotated[Text, Field(min_length=1)]
    input: Text = ""
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP)] | None = None

    @property
    def scored_tokens(self) -> int | None:
        """How many of the best tokens are scored beside each token: `logprobs`."""
        return self.logprobs


class RenderRequest(StrictFields):
    """An instruction and its input, a conversation, or a task's fields; the reply is the prompt that the model would read."""

    instruction: Text = ""
    input: Text = ""
    messages: Annotated[list[Message], bounded_list(MOST_MESSAGES)] | None = None
    task: Name | None = None
    template: Name | None = None
    fields: Row | None = None
    model: Name | None = None

    @model_validator(mode="after")
    def _fields_have_a_task(self) -> Self:
        if self.task is None and (self.fields is not None or self.template is not None):
            raise ValueError("`fields` and `template` are a task's; name it in `task`")
        return self


class TaskRequest(StrictFields):
    """A row of a task: its fields, and the template that asks (default: the first)."""

    fields: Row
    template: Name | None = None
    model: Name | None = None
    max_tokens: TokenCount | None = None
