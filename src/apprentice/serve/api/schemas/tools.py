"""Schemas of functions in chat requests: definitions, the choice among them, and calls in a conversation's history."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from apprentice.serve.api.schemas.field_types import Name, Schema, StrictFields, Text

MOST_TOOLS = 128
MOST_SCHEMA_CHARACTERS = 400_000  # of all functions' schemas as JSON; their grammar is compiled in a second or two
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.\-]+$", min_length=1, max_length=64)]


class FunctionDefinition(StrictFields):
    """A function that the model may call; `parameters` is the JSON Schema of its arguments."""

    name: FunctionName
    description: Text = ""
    parameters: Schema = Field(default_factory=lambda: {"type": "object", "properties": {}})
    strict: bool | None = Field(None, description="Accepted and not used: arguments always follow the schema.")

    @field_validator("parameters")
    @classmethod
    def _is_of_an_object(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        if parameters.get("type", "object") != "object":
            raise ValueError(
                f"the arguments of a call are a JSON object, and this schema's type is {parameters['type']!r};"
                " make it an object with a property"
            )
        return parameters


class Tool(StrictFields):
    """A function in OpenAI's form."""

    type: Literal["function"]
    function: FunctionDefinition

    @property
    def shown(self) -> dict[str, Any]:
        """The function as chat templates read it."""
        function = self.function
        described = {"description": function.description} if function.description else {}
        return {"type": "function", "function": {"name": function.name, **described, "parameters": function.parameters}}


class ChosenFunction(StrictFields):
    """The name of a function."""

    name: FunctionName


class NamedTool(StrictFields):
    """The function that must be called."""

    type: Literal["function"]
    function: ChosenFunction


ToolChoice = Literal["auto", "none", "required"] | NamedTool


class FunctionOfTurn(StrictFields):
    """A function that was called, and its arguments as the text of a JSON object."""

    name: FunctionName
    arguments: Text

    @field_validator("arguments")
    @classmethod
    def _is_object(cls, arguments: str) -> str:
        try:
            values = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            values = None
        if not isinstance(values, dict):
            raise ValueError("the arguments of a call are the text of a JSON object, and this is none")
        return arguments


class CallOfTurn(StrictFields):
    """A call in an assistant's turn."""

    id: Name
    type: Literal["function"]
    function: FunctionOfTurn
