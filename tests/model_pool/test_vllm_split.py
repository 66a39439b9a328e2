"""vLLM with a model split over two processes, for workers and for the endpoint's engine, against our own engine.

Runs in the environment that `make vllm` makes, in float32, where both say the same.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from apprentice.inference.choices.choice_scoring import choice_logprobs
from apprentice.inference.decoding import generate
from apprentice.inference.generation_request import GenerationRequest
from apprentice.models.loading import load_model
from apprentice.serve.engines.base import Engine
from apprentice.serve.engines.transformers import TransformersEngine
from tests.support.vllm_signatures import NAMES, names_of_installed

pytest.importorskip("vllm", reason="needs the vllm environment (make vllm)")
pytestmark = [pytest.mark.slow, pytest.mark.cluster]
PROMPTS = [list(range(3, 3 + length)) for length in (1, 30, 9, 200)]
CHOICES = [[[5, 2], [6, 7, 2]], [[9, 2]], [[4, 2], [11, 2]], [[8], [8, 2], [12, 13, 14, 2]]]
LIMITS: dict[str, Any] = {"dtype": "float32", "max_running": 4, "max_queued": 2, "context": 600, "threads": 2}


@pytest.fixture(scope="module")
def split(tiny_model: Path) -> Iterator[Any]:
    from apprentice.model_pool.vllm_model import VllmModel

    model = VllmModel(tiny_model, device="cpu", dtype="float32", context=600, threads=2, tensor_parallel=2)
    yield model
    model._llm.llm_engine.engine_core.shutdown()


def test_the_recorded_names_are_those_of_the_installed_vllm() -> None:
    assert names_of_installed() == NAMES


def test_a_split_worker_answers_and_scores_as_the_whole_model(split: Any, tiny_model: Path) -> None:
    whole = load_model(tiny_model, torch.float32)
    limits: dict[str, Any] = {"max_new_tokens": 15, "stop_ids": {2}}
    assert split._llm.llm_engine.vllm_config.parallel_config.tensor_parallel_size == 2
    assert split.generate(PROMPTS, **limits) == generate(whole, PROMPTS, **limits)
    ours = choice_logprobs(whole, PROMPTS, CHOICES)
    for one, other in zip(split.choice_logprobs(PROMPTS, CHOICES), ours, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_a_split_engine_replies_as_ours_does(tiny_model: Path) -> None:
    from apprentice.serve.engines.vllm import VllmEngine

    async def replies(engine: Engine) -> list[list[int]]:
        streams = engine.generate([GenerationRequest(tuple(prompt), 15, frozenset({2})) for prompt in PROMPTS])
        return [[token.id async for tokens in stream for token in tokens] for stream in streams]

    async def both() -> tuple[list[list[int]], list[list[int]]]:
        theirs = VllmEngine(tiny_model, **LIMITS, tensor_parallel=2)
        ours = TransformersEngine(tiny_model, **LIMITS)
        try:
            return await replies(theirs), await replies(ours)
        finally:
            theirs.close()
            ours.close()

    theirs, ours = asyncio.run(both())
    assert theirs == ours
