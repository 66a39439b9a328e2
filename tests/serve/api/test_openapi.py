"""Requests made up from our own OpenAPI description, right ones and wrong ones: none is a fault of the endpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.serve.api.application import build_app
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.tasks.registry import library, load_task
from tests.serve.scripted import ScriptedEngine

pytestmark = pytest.mark.slow
EXAMPLES = 15  # of each kind for each route


def test_nothing_made_up_is_a_fault_of_ours(chat_model: Path) -> None:
    layout = layout_beside(chat_model)
    engine = ScriptedEngine([*layout.tokenizer.encode("Good day."), layout.stop_ids[0]])
    tasks = [load_task(library()[name]) for name in ("ag_news", "multi30k_en_de")]
    # Not ready is what /ready is for, and it says so with status 503.
    app = build_app(Catalogue([ServedModel("tiny", engine, layout)]), tasks=tasks)
    schema = schemathesis.openapi.from_asgi("/openapi.json", app).exclude(path="/ready")
    answered: dict[str, list[int]] = {}

    def ask(strategy: Any) -> None:
        @settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def check(case: Any) -> None:
            response = case.call()
            answered.setdefault(case.path, []).append(response.status_code)
            assert response.status_code < 500, response.text
            if response.status_code >= 400:
                assert response.json()["error"]["message"]

        check()

    for result in schema.get_all_operations():
        operation = result.ok()
        ask(operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        if operation.body:
            ask(operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
    assert len(answered) == 11
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/instruct", "/v1/render"):
        # A schema cannot say how a conversation ends, or that functions fit its calls, so few made-up chats are right.
        assert {400} | ({200} if "chat" not in path else set()) <= set(answered[path])
        assert len(answered[path]) >= EXAMPLES
    assert engine.open == 0
