"""The built-in reward functions, each over replies that are worth something and nothing."""

from __future__ import annotations

from typing import Any

import pytest

from apprentice.recipe import RewardTerm
from apprentice.rewards.text_functions import text_function

PERSON = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "friend": {"$ref": "#/$defs/friend"}},
    "required": ["name"],
    "$defs": {"friend": {"type": "object", "required": ["name"]}},
}


@pytest.mark.parametrize(
    ("keys", "reply", "reward"),
    [
        ({"function": "exact_match"}, " 7 +  5 = 12\n", 1.0),
        ({"function": "exact_match"}, "7 - 5 = 12", 0.0),  # signs count
        ({"function": "math"}, "12", 1.0),
        ({"function": "math"}, "13", 0.0),
        ({"function": "regex", "pattern": r"\d+ \+ .*"}, "7 + 5\n= 12", 1.0),
        ({"function": "regex", "pattern": r"\d+"}, "12 apples", 0.0),  # the whole reply
        ({"function": "json_schema", "json_schema": PERSON}, '{"name": "Ana", "friend": {"name": "Ben"}}', 1.0),
        ({"function": "json_schema", "json_schema": PERSON}, '{"name": "Ana", "friend": {}}', 0.0),
        ({"function": "json_schema", "json_schema": PERSON}, '{"name": NaN}', 0.0),
        ({"function": "json_schema", "json_schema": {}}, "Infinity", 0.0),  # not JSON, whatever the schema allows
        ({"function": "json_schema", "json_schema": PERSON}, "[" * 100_000, 0.0),
        ({"function": "json_schema", "json_schema": PERSON}, "Ana", 0.0),
        # What the model writes ends no training, however deep or large it is.
        ({"function": "json_schema", "json_schema": {"items": {"$ref": "#"}}}, "[" * 300 + "]" * 300, 0.0),
        ({"function": "json_schema", "json_schema": {"multipleOf": 0.01}}, "1e999", 0.0),
        ({"function": "json_schema", "json_schema": {"multipleOf": 0.01}}, "9" * 400, 0.0),
        ({"function": "json_schema", "json_schema": {"anyOf": [{"type": "null"}, {"not": {"$ref": "#/anyOf/0"}}]}}, "1", 1.0),
    ],
)
def test_what_a_reply_is_worth(keys: dict[str, Any], reply: str, reward: float) -> None:
    assert text_function(RewardTerm(**keys))(reply, ("7 + 5 = 12",)) == reward


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "nonsense"}, "the schema is no JSON Schema: 'nonsense' is not valid"),
        ({"items": [{"$ref": "https://example.org/a.json"}]}, "refers to 'https://example.org/a.json' outside itself"),
        ({"anyOf": [{}], "not": {"$ref": "#/anyOf/1"}}, "refers to '#/anyOf/1', which is not in it"),
        ({"$ref": "#/$defs/nobody"}, "refers to '#/\\$defs/nobody', which is not in it"),
    ],
)
def test_a_schema_that_is_none(schema: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        text_function(RewardTerm(function="json_schema", json_schema=schema))
