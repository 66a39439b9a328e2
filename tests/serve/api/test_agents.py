"""Agent loops of other people's libraries over our endpoint, by real HTTP: LangChain's and the `openai` package's own helpers.

The model is random: what it calls is forced into the functions' schemas, and how an agent goes on is the library's doing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import openai
import pytest
import uvicorn
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.serve.api.application import build_app
from apprentice.serve.engines.transformers import TransformersEngine
from apprentice.serve.generation.served_models import Catalogue, ServedModel

City = Literal["Oslo", "Rome"]


@pytest.fixture(scope="module")
def address(chat_model: Path) -> Iterator[str]:
    """Base address of an endpoint that listens on a port of its own."""
    engine = TransformersEngine(chat_model, dtype="float32", max_running=4, max_queued=4, context=1500, threads=1, device="cpu")
    app = build_app(Catalogue([ServedModel("tiny", engine, layout_beside(chat_model))]))
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    is_up = threading.Event()
    started = server.startup

    async def startup(sockets: Any = None) -> None:
        await started(sockets)
        is_up.set()

    server.startup = startup  # type: ignore[method-assign]
    thread = threading.Thread(target=server.run)
    thread.start()
    assert is_up.wait(60)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/v1"
    server.should_exit = True
    thread.join(30)
    engine.close()


@tool
def temperature(city: City, day: Literal["today", "tomorrow"]) -> str:
    """The temperature in a city."""
    return f"{len(city)} degrees {day}"


@tool
def advice(warm: bool) -> str:
    """What to wear."""
    return "a shirt" if warm else "a coat"


def test_a_langchain_agent_calls_two_functions_and_answers(address: str) -> None:
    model = ChatOpenAI(model="tiny", base_url=address, api_key="none", temperature=0, max_tokens=300, seed=1)  # type: ignore[call-arg,arg-type]
    functions: dict[str, Any] = {one.name: one for one in (temperature, advice)}
    messages: list[BaseMessage] = [HumanMessage("What shall I wear in Oslo?")]
    for choice in ("temperature", "advice"):
        reply = model.bind_tools(list(functions.values()), tool_choice=choice, parallel_tool_calls=False, strict=True).invoke(
            messages
        )
        messages.append(reply)
        (call,) = reply.tool_calls
        assert call["name"] == choice
        result = functions[choice].invoke(call)
        assert isinstance(result, ToolMessage)
        messages.append(result)
    assert messages[2].content in {f"4 degrees {day}" for day in ("today", "tomorrow")}
    assert messages[4].content in ("a shirt", "a coat")
    answer = model.bind_tools(list(functions.values()), tool_choice="none").invoke(messages)
    assert isinstance(answer, AIMessage)
    assert answer.content
    assert not answer.tool_calls
    pieces = list(model.bind_tools([temperature], tool_choice="any", parallel_tool_calls=False, strict=True).stream(messages[:1]))
    whole = pieces[0]
    for piece in pieces[1:]:
        whole += piece
    assert len(pieces) > 3
    assert [call["name"] for call in whole.tool_calls] == ["temperature"]


def test_langchain_reads_an_answer_of_a_given_form(address: str) -> None:
    class Forecast(BaseModel):
        city: City
        warm: bool

    model = ChatOpenAI(model="tiny", base_url=address, api_key="none", temperature=0, max_tokens=300)  # type: ignore[call-arg,arg-type]
    form = model.with_structured_output(Forecast, method="function_calling", strict=True)
    assert isinstance(form.invoke("Oslo?"), Forecast)


class Weather(BaseModel):
    """The weather of a city."""

    city: City
    day: Literal["today", "tomorrow"]


def test_the_openai_package_parses_calls_into_its_users_classes(address: str) -> None:
    client = openai.OpenAI(base_url=address, api_key="none")
    settings: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Rome?"}],
        "tools": [openai.pydantic_function_tool(Weather)],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "max_tokens": 80,
    }
    (call,) = client.chat.completions.parse(**settings).choices[0].message.tool_calls or ()
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(**settings) as stream:
        kinds = {event.type for event in stream}
        (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    assert streamed.function.parsed_arguments == call.function.parsed_arguments
