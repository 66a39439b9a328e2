"""Tasks at the endpoint: which fields a wording needs of a row, and which choices it offers for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from apprentice.serve.api.error_status import RequestProblem
from apprentice.serve.api.schemas.requests import RenderRequest
from apprentice.serve.generation.task_answers import describe_task, render_task
from apprentice.tasks.schema import Task

TASK = Task.model_validate(
    {
        "name": "endings",
        "cluster": "commonsense",
        "sources": [{"dataset": "endings"}],
        "choices": "endings",
        "label": "right",
        "metrics": ["accuracy"],
        "templates": [
            {"name": "whole", "instruction": "How does it go on?", "input": "{{ start }}"},
            {
                "name": "letters",
                "instruction": "Which letter?",
                "input": "{% for ending in endings %}{{ choices[loop.index0] }}: {{ ending }} {% endfor %}",
                "choices": ["A", "B", "C", "D"],
            },
            {"name": "short", "instruction": "Which?", "choices": "shorter"},
        ],
    }
)
LAYOUT: Any = SimpleNamespace(
    prompt=lambda instruction, input: f"{instruction} {input}", shown=lambda text: text, encode_prompt=lambda text: [len(text)]
)
ROW = {"start": "He sat", "endings": ["down", "up"], "shorter": ["d", "u"]}


@pytest.mark.parametrize(("name", "choices"), [("whole", ["down", "up"]), ("letters", ["A", "B"]), ("short", ["d", "u"])])
def test_a_wording_offers_its_own_choices(name: str, choices: list[str]) -> None:
    assert render_task(TASK, RenderRequest(task="endings", template=name, fields=ROW), LAYOUT).choices == choices


def test_the_fields_are_those_of_the_text_and_of_all_choices() -> None:
    assert describe_task(TASK).fields == ["endings", "shorter", "start"]
    assert describe_task(TASK).choices is None
    with pytest.raises(RequestProblem, match="'shorter' is missing; this wording of 'endings' needs endings, shorter"):
        render_task(TASK, RenderRequest(task="endings", template="short", fields={"endings": ["a"]}), LAYOUT)
    with pytest.raises(RequestProblem, match="it has 4 choices of its own, and the row has 5"):
        render_task(TASK, RenderRequest(task="endings", template="letters", fields={"endings": list("vwxyz")}), LAYOUT)
