"""vLLM's engine over a stand-in for its package: tokens, refusals, aborts and the end, as vLLM 0.29's `generate` has them."""

from __future__ import annotations

import asyncio
import importlib
import sys
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from apprentice.inference.generation_request import GeneratedToken, GenerationRequest
from apprentice.serve.engines.base import EngineFailed, RequestFailed
from tests.support.vllm_signatures import AsyncEngineArgs, SamplingParams

pytestmark = pytest.mark.asyncio
LIMITS: dict[str, Any] = {"dtype": "float32", "max_running": 4, "max_queued": 2, "context": 600, "threads": 1}


class EngineDeadError(Exception):
    """As vLLM's."""


class EngineGenerateError(Exception):
    """As vLLM's."""


class Parameters(SimpleNamespace):
    """Stands for vLLM's classes of arguments, which only keep what they are given."""


class StandInLLM:
    """Replies with the token ids 5, 6, 7, and holds the request with the prompt (9,) back."""

    errored = False

    def __init__(self) -> None:
        self.vllm_config = SimpleNamespace(cache_config=SimpleNamespace(num_gpu_blocks=10, block_size=128))
        self.model_config = SimpleNamespace(get_vocab_size=lambda: 512)
        self.began: list[str] = []
        self.aborted: list[str] = []
        self.is_shut_down = False
        self.arguments: dict[str, Any] = {}

    @classmethod
    def from_engine_args(cls, arguments: Any) -> StandInLLM:
        made = cls()
        made.arguments = vars(arguments)
        return made

    def get_tokenizer(self) -> Any:
        return SimpleNamespace(eos_token_id=2)

    async def generate(self, prompt: list[int], params: Any, request_id: str, *, lora_request: Any) -> AsyncGenerator[Any, None]:
        self.began.append(request_id)
        try:
            if prompt == [8]:
                raise ValueError("its grammar is empty")
            if prompt == [7]:
                raise EngineDeadError
            for ids, finish in (([5], None), ([6, 7], "stop")):
                if prompt == [9] and finish:
                    await asyncio.Event().wait()
                reply = SimpleNamespace(token_ids=ids, logprobs=None, finish_reason=finish)
                yield SimpleNamespace(outputs=[reply], prompt_logprobs=None, num_cached_tokens=1)
        except (asyncio.CancelledError, GeneratorExit):
            self.aborted.append(request_id)
            raise
        except ValueError as error:
            raise EngineGenerateError from error

    def shutdown(self) -> None:
        self.is_shut_down = True


@pytest.fixture
def vllm_engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The module of our engine, imported over the stand-in."""
    parts: dict[str, dict[str, Any]] = {
        "vllm": {},
        "vllm.engine": {},
        "vllm.engine.arg_utils": {"AsyncEngineArgs": AsyncEngineArgs},
        "vllm.inputs": {},
        "vllm.inputs.engine": {"tokens_input": lambda ids: ids},
        "vllm.lora": {},
        "vllm.lora.request": {"LoRARequest": Parameters},
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(DELTA=1),
            "SamplingParams": SamplingParams,
            "StructuredOutputsParams": Parameters,
        },
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.async_llm": {"AsyncLLM": StandInLLM},
        "vllm.v1.engine.exceptions": {"EngineDeadError": EngineDeadError, "EngineGenerateError": EngineGenerateError},
    }
    for name, names in parts.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    ours = ("apprentice.serve.engines.vllm", "apprentice.serve.engines.compat")
    for name in ours:
        monkeypatch.delitem(sys.modules, name, raising=False)
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "1")
    engine = importlib.import_module(ours[0])
    monkeypatch.setattr(engine, "guard_children", lambda: None)
    yield engine
    for name in ours:
        sys.modules.pop(name, None)


async def tokens_of(stream: Any) -> list[GeneratedToken]:
    return [token async for tokens in stream for token in tokens]


async def test_tokens_come_as_vllm_gives_them(vllm_engine: Any, tiny_model: Path) -> None:
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS)
    (stream,) = engine.generate([GenerationRequest((3, 4), 16)])
    tokens = await tokens_of(stream)
    stream.close()
    assert [(token.id, token.finish, token.reused) for token in tokens] == [(5, None, 1), (6, None, 0), (7, "stop", 0)]
    assert engine.stats()[:6] == (0, 0, 1, 3, 2, 1)
    await asyncio.sleep(0)
    assert engine._llm.aborted == []  # it has ended by itself
    engine.close()
    assert engine._llm.is_shut_down


async def test_the_models_limits_and_gpus_are_vllms_arguments(vllm_engine: Any, tiny_model: Path) -> None:
    settings: dict[str, Any] = {"device": "cuda", "tensor_parallel": 2, "adapters": 3, "kv_bytes": 8000}
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS, **settings)
    arguments = engine._llm.arguments
    assert {name: arguments[name] for name in ("tensor_parallel_size", "distributed_executor_backend", "dtype")} == {
        "tensor_parallel_size": 2,
        "distributed_executor_backend": "mp",
        "dtype": "float32",
    }
    assert (arguments["kv_cache_memory_bytes"], arguments["max_loras"]) == (4000, 4)
    engine.close()


async def test_a_replys_end_does_not_wait_for_the_pace(vllm_engine: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS)
    monkeypatch.setattr(vllm_engine, "pacing_seconds", lambda _: 600.0)
    async with asyncio.timeout(10):
        (stream,) = engine.generate([GenerationRequest((3, 4), 16)])
        first = await anext(stream)
        last = await anext(stream)
    assert [token.id for token in first + last] == [5, 6, 7]
    assert last[-1].finish == "stop"
    stream.close()
    engine.close()


async def test_tokens_that_wait_for_the_pace_are_given_up_with_their_stream(
    vllm_engine: Any, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS)
    (stream,) = engine.generate([GenerationRequest((9,), 16)])
    await anext(stream)
    monkeypatch.setattr(vllm_engine, "pacing_seconds", lambda _: 600.0)
    reading = asyncio.create_task(anext(stream))
    await asyncio.sleep(0)
    engine.close()
    with pytest.raises(EngineFailed, match="the engine was closed"):
        await reading


async def test_a_refusal_is_of_this_request_and_a_dead_process_is_the_engines_end(vllm_engine: Any, tiny_model: Path) -> None:
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS)
    refused, dead = engine.generate([GenerationRequest((8,), 16), GenerationRequest((7,), 16)])
    with pytest.raises(RequestFailed, match="its grammar is empty"):
        await tokens_of(refused)
    with pytest.raises(EngineFailed, match="vLLM's own process has ended"):
        await tokens_of(dead)
    engine.close()


@pytest.mark.parametrize("is_read", [False, True])
async def test_a_stream_that_is_given_up_is_aborted(vllm_engine: Any, tiny_model: Path, is_read: bool) -> None:
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS)
    (stream,) = engine.generate([GenerationRequest((9,), 16)])
    assert [token.id for token in await anext(stream)] == [5]
    reading = asyncio.create_task(anext(stream)) if is_read else None
    await asyncio.sleep(0)
    stream.close()
    assert engine.stats().running == 0
    async with asyncio.timeout(10):
        while not engine._llm.aborted:
            await asyncio.sleep(0)
    if reading is not None:
        with pytest.raises(asyncio.CancelledError):
            await reading
    engine.close()


async def test_whoever_waits_for_tokens_learns_of_the_engines_end(vllm_engine: Any, tiny_model: Path) -> None:
    engine = vllm_engine.VllmEngine(tiny_model, **LIMITS)
    (stream,) = engine.generate([GenerationRequest((9,), 16)])
    await anext(stream)
    reading = asyncio.create_task(tokens_of(stream))
    await asyncio.sleep(0)
    engine.close()
    with pytest.raises(EngineFailed, match="the engine was closed"):
        await reading
    with pytest.raises(EngineFailed, match="the engine was closed"):
        engine.generate([GenerationRequest((3,), 1)])
