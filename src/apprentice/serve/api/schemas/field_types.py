"""Types of request fields. Each has an upper bound, so that values larger than any use are refused before they cost anything.

A refusal is cheap too: a list's validation ends at its first fault, because pydantic makes an error for each and FastAPI copies
them all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_MOST_BIASES = 1024
_GRAMMAR_CHARACTERS = 100_000  # of a regular expression, or of a schema as JSON


class StrictFields(BaseModel):
    """Base class of request objects: unknown keys are refused, the first of them by name.

    Keys without a value are dropped, and so are those with a value that asks for nothing (`neutral`: key → such values).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    neutral: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        meaningful = {
            key: value for key, value in values.items() if value is not None and value not in cls.neutral.get(str(key), ())
        }
        known = {field.alias or name for name, field in cls.model_fields.items()} | cls.model_fields.keys()
        unknown = next((key for key in meaningful if key not in known), None)
        return {key: value for key, value in meaningful.items() if key in known or key == unknown}


def bounded_list(most: int, *, least: int = 0) -> Any:
    """`Field` of a list with `least` to `most` items."""
    return Field(min_length=least, max_length=most, fail_fast=True)


def _encodable(text: Any) -> Any:
    if isinstance(text, str) and not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError("the text holds half of a surrogate pair, which is no character") from error
    return text


def _bounded_schema(schema: dict[str, Any]) -> dict[str, Any]:
    if len(json.dumps(schema)) > _GRAMMAR_CHARACTERS:
        raise ValueError(f"the schema has more than {_GRAMMAR_CHARACTERS} characters as JSON")
    return schema


def _bounded_biases(values: Any) -> Any:
    if isinstance(values, Mapping) and len(values) > _MOST_BIASES:
        raise ValueError(f"at most {_MOST_BIASES} tokens may have a bias")
    return values


_ENCODABLE = BeforeValidator(_encodable)  # runs before pydantic's own checks, which fail on such a text
Text = Annotated[str, Field(max_length=2**22), _ENCODABLE]  # a prompt, a message, an instruction
Name = Annotated[str, Field(max_length=256), _ENCODABLE]  # of a model, a task, a template, a schema, a field
Stop = Annotated[str, Field(max_length=256), _ENCODABLE]  # a stop string
Regex = Annotated[str, Field(max_length=_GRAMMAR_CHARACTERS), _ENCODABLE]
ChoiceText = Annotated[str, Field(max_length=4096), _ENCODABLE]
Schema = Annotated[dict[str, Any], AfterValidator(_bounded_schema)]  # a JSON schema
Row = Annotated[dict[Name, Any], Field(max_length=256)]  # a task's fields
Metadata = Annotated[dict[Name, Annotated[str, Field(max_length=512)]], Field(max_length=16)]  # OpenAI's bounds
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], bounded_list(2**20)]
TokenCount = Annotated[int, Field(ge=1, lt=2**31)]
Biases = Annotated[dict[TokenId, Annotated[float, Field(ge=-100.0, le=100.0)]], BeforeValidator(_bounded_biases)]
