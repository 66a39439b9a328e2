"""An encoder-decoder behind the same protocol: company does not matter, tasks are ranked, what it cannot say is refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import pytest_asyncio
import torch

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.inference.choices.seq2seq_scoring import seq2seq_logprobs
from apprentice.models.loading import load_model
from apprentice.run.contract import read_contract
from apprentice.serve.api.application import build_app
from apprentice.serve.engines.transformers import TransformersEngine
from apprentice.serve.generation.served_models import Catalogue, ServedModel
from apprentice.tasks.registry import library, load_task
from tests.serve.api.routes.test_routes import events

pytestmark = pytest.mark.asyncio


@pytest_asyncio.fixture
async def http(t5_model: Path) -> AsyncIterator[httpx.AsyncClient]:
    engine = TransformersEngine(t5_model, dtype="float32", max_running=8, max_queued=16, context=512, threads=1)
    app = build_app(Catalogue([ServedModel("t5", engine, layout_beside(t5_model))]), tasks=[load_task(library()["ag_news"])])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
        yield client
    engine.close()


async def test_replies_alone_and_in_company_are_identical(http: httpx.AsyncClient) -> None:
    bodies = [
        {
            "instruction": f"Count to {number}.",
            "input": "one two " * number,
            "max_tokens": 12,
            "temperature": number % 2,
            "seed": number,
        }
        for number in range(10)
    ]

    async def text(body: dict[str, Any]) -> str:
        return str((await http.post("/v1/instruct", json=body)).json()["choices"][0]["text"])

    together = await asyncio.gather(*(text(body) for body in bodies))
    assert [await text(body) for body in bodies] == list(together)
    assert len(set(together)) > 4
    stream = await http.post("/v1/instruct", json=bodies[1] | {"stream": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in events(stream.text)[:-1]) == together[1]


async def test_a_task_is_ranked_as_evaluation_does(http: httpx.AsyncClient, t5_model: Path) -> None:
    answer = (await http.post("/v1/tasks/ag_news", json={"fields": {"text": "The striker scored twice."}})).json()
    layout = layout_beside(t5_model)
    choices = [[*ids, *layout.end_ids] for ids in layout.encode_answers([entry["choice"] for entry in answer["choices"]])]
    model = load_model(t5_model, torch.float32)
    (expected,) = seq2seq_logprobs(model, [layout.encode_prompt(answer["prompt"])], [choices], 4096)
    assert [entry["logprob"] for entry in answer["choices"]] == pytest.approx(expected, abs=1e-3)
    assert len(expected) == 4


@pytest.mark.parametrize("rank_by", ["sum", "mean", "pmi"])
async def test_the_endpoint_ranks_as_the_contract_says(t5_model: Path, rank_by: str) -> None:
    layout, contract = layout_beside(t5_model), read_contract(t5_model)
    assert contract is not None
    engine = TransformersEngine(t5_model, dtype="float32", max_running=8, max_queued=16, context=512, threads=1)
    served = ServedModel("t5", engine, layout, contract.model_copy(update={"rank_by": rank_by}))
    task = load_task(library()["ag_news"])
    app = build_app(Catalogue([served]), tasks=[task])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test", timeout=60) as client:
        answer = (await client.post("/v1/tasks/ag_news", json={"fields": {"text": "The striker scored twice."}})).json()
        choices = [[*ids, *layout.end_ids] for ids in layout.encode_answers([entry["choice"] for entry in answer["choices"]])]
        model = load_model(t5_model, torch.float32)
        prompts = [layout.encode_prompt(answer["prompt"]), layout.encode_prompt(layout.prompt("", ""))]
        sums, priors = seq2seq_logprobs(model, prompts, [choices] * 2, 4096)
        scores = {
            "sum": sums,
            "mean": [value / len(ids) for value, ids in zip(sums, choices, strict=True)],
            "pmi": [value - prior for value, prior in zip(sums, priors, strict=True)],
        }[rank_by]
        shares = torch.tensor(scores).softmax(0).tolist()
        assert [entry["probability"] for entry in answer["choices"]] == pytest.approx(shares, abs=1e-4)
        assert [entry["logprob"] for entry in answer["choices"]] == pytest.approx(sums, abs=1e-3)
        assert answer["answer"] == answer["choices"][max(range(4), key=scores.__getitem__)]["choice"]
        assert answer["ranked_by"] == rank_by
        engine._model.get_output_embeddings().weight.data.fill_(float("nan"))
        broken = await client.post("/v1/tasks/ag_news", json={"fields": {"text": "a"}})
        assert (broken.status_code, broken.json()["error"]["code"]) == (500, "not_finite")
    engine.close()


async def test_what_an_encoder_decoder_cannot_say_is_refused(http: httpx.AsyncClient) -> None:
    refused = await http.post("/v1/completions", json={"prompt": "a", "echo": True, "logprobs": 1})
    assert (refused.status_code, "gives its prompt no probabilities" in refused.text) == (400, True)
    scored = (await http.post("/v1/completions", json={"prompt": "a", "logprobs": 1, "max_tokens": 3})).json()
    assert len(scored["choices"][0]["logprobs"]["token_logprobs"]) == scored["usage"]["completion_tokens"]
