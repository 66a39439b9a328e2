"""Requests to a house of devices, answered by calls of functions, or by words where none fits; and sums with their thoughts."""

from __future__ import annotations

import json
from typing import Any

from apprentice.tasks.builtin.seeded_random import SeededRandom

ROOMS = ["kitchen", "bedroom", "office", "hall", "garage", "nursery", "cellar", "attic"]
COLOURS = ["white", "red", "blue", "green", "amber"]
THINGS = ["rice", "milk", "soap", "bread", "tea", "flour", "salt", "pasta", "honey", "coffee"]
PLACES = ["Oslo", "Lima", "Kyoto", "Accra", "Porto", "Quito", "Turin", "Perth", "Dakar", "Riga"]
_PROPERTIES: dict[str, dict[str, dict[str, Any]]] = {
    "set_light": {"room": {"type": "string"}, "colour": {"type": "string", "enum": COLOURS}},
    "set_heating": {"room": {"type": "string"}, "degrees": {"type": "integer"}},
    "start_timer": {"minutes": {"type": "integer"}},
    "add_to_list": {"items": {"type": "array", "items": {"type": "string"}}},
}
_PURPOSES = {
    "set_light": "Sets the colour of a room's light.",
    "set_heating": "Heats a room to a temperature in degrees Celsius.",
    "start_timer": "Starts a timer.",
    "add_to_list": "Adds items to the shopping list.",
}
NO_FUNCTION = "No function here can do that."


def device_calls(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `request`, `tools` and `answer`: one call, two at once, or none, by turns of four."""
    names = rng.some(list(_PROPERTIES), 3)
    kind = number % 4
    if kind == 3:  # no function that is offered fits
        request = rng.one(
            [
                f"How far is it from {rng.one(PLACES)} to {rng.one(PLACES)}?",
                f"Book a table for {rng.between(2, 9)} in {rng.one(PLACES)}.",
                f"What is the weather like in {rng.one(PLACES)} in {rng.between(2, 20)} days?",
            ]
        )
        calls: list[dict[str, Any]] = []
    else:
        parts = [_call(rng, name) for name in names[: 2 if kind == 2 else 1]]
        request = " Also, ".join([parts[0][0], *(text[0].lower() + text[1:] for text, _ in parts[1:])])
        calls = [call for _, call in parts]
    offered = rng.shuffled(names)
    tools = [
        {
            "type": "function",
            "function": {
                "name": name,
                "description": _PURPOSES[name],
                "parameters": {"type": "object", "properties": _PROPERTIES[name], "required": list(_PROPERTIES[name])},
            },
        }
        for name in offered
    ]
    return {"request": request, "tools": json.dumps(tools), "answer": json.dumps(calls) if calls else NO_FUNCTION}


def _call(rng: SeededRandom, name: str) -> tuple[str, dict[str, Any]]:
    """A request in words, and the call that answers it."""
    room, colour, degrees, minutes = rng.one(ROOMS), rng.one(COLOURS), rng.between(15, 25), rng.between(1, 90)
    items = rng.some(THINGS, rng.between(1, 3))
    words = {
        "set_light": f"Make the light in the {room} {colour}.",
        "set_heating": f"Heat the {room} to {degrees} degrees.",
        "start_timer": f"Wake me in {minutes} minutes.",
        "add_to_list": f"We are out of {' and '.join(items)}.",
    }
    arguments: dict[str, dict[str, Any]] = {
        "set_light": {"room": room, "colour": colour},
        "set_heating": {"room": room, "degrees": degrees},
        "start_timer": {"minutes": minutes},
        "add_to_list": {"items": items},
    }
    return words[name], {"name": name, "arguments": arguments[name]}


def thought_sums(rng: SeededRandom, number: int) -> dict[str, Any]:
    """Row with `problem`, `thought` and `total`: a sum of three numbers, added one after another."""
    first, second, third = rng.between(2, 60), rng.between(2, 60), rng.between(2, 60)
    problem = f"What is {first} + {second} + {third}?"
    half = first + second
    thought = f"{first} + {second} = {half}. {half} + {third} = {half + third}."
    return {"problem": problem, "thought": thought, "total": str(half + third)}
