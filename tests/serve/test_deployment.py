"""The whole endpoint under Ray Serve, over real HTTP, with OpenAI's own client."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
import torch
import yaml
from ray.serve.schema import ServeDeploySchema

from apprentice.data.encoding import prompt_contract
from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import ContractError, ModelError, ServingError, TaskError
from apprentice.inference.decoding import generate
from apprentice.model_pool import engine_choice
from apprentice.models.loading import load_model
from apprentice.recipe import Serving
from apprentice.run.contract import read_contract
from apprentice.serve import deployment
from apprentice.serve.api.limits.api_keys import new_key
from apprentice.serve.api.request_metrics import exported_names
from apprentice.serve.deployment import AppArguments, Endpoint, application, check, start
from apprentice.tasks.registry import library
from tests.conftest import ROOT
from tests.models.adapters import merged
from tests.serve.company import alone_and_together
from tests.support.sockets import listening


def sync_client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)


def test_openais_client(endpoint: Endpoint) -> None:
    client = sync_client(endpoint)
    assert [model.id for model in client.models.list()] == ["tiny", "t5", "rhymes"]
    request_body: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "Is this the film?"}],
        "max_completion_tokens": 12,
        "extra_body": {"ignore_eos": True},
    }
    whole = client.chat.completions.create(**request_body)
    assert whole.usage is not None
    assert (whole.usage.completion_tokens, whole.choices[0].finish_reason) == (12, "length")
    chunks = list(client.chat.completions.create(**request_body, stream=True, stream_options={"include_usage": True}))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert len(text) > 0
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    raw = client.completions.create(model="tiny", prompt="Sort the numbers", max_tokens=5, temperature=0.9, seed=3)
    again = client.completions.create(model="tiny", prompt="Sort the numbers", max_tokens=5, temperature=0.9, seed=3, stream=True)
    assert "".join(chunk.choices[0].text for chunk in again) == raw.choices[0].text


def test_nothing_listens_beyond_this_machine(endpoint: Endpoint) -> None:
    """Ray Serve's processes, too: proxy, controller, replicas."""
    assert [(name, address) for name, address in listening() if not address.startswith("127.")] == []


def test_openais_client_understands_errors(endpoint: Endpoint) -> None:
    client = sync_client(endpoint)
    with pytest.raises(openai.BadRequestError, match=r"`functions` is not supported here\.") as refused:
        client.chat.completions.create(
            model="tiny",
            messages=[{"role": "user", "content": "a"}],
            functions=[{"name": "f"}],
        )
    assert (refused.value.param, refused.value.code) == ("functions", "unsupported_parameter")
    with pytest.raises(openai.NotFoundError, match="Did you mean 'tiny'"):
        client.completions.create(model="tinny", prompt="a")


@pytest.mark.asyncio
async def test_openais_async_client_streams(endpoint: Endpoint) -> None:
    async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:
        stream = await client.completions.create(
            model="tiny", prompt="Which topic", max_tokens=6, stream=True, extra_body={"ignore_eos": True}
        )
        finishes = [chunk.choices[0].finish_reason async for chunk in stream]
    assert finishes[-1] == "length"
    assert set(finishes[:-1]) == {None}


@pytest.mark.asyncio
async def test_replies_alone_and_among_sixteen_are_identical(endpoint: Endpoint) -> None:
    alone, together = await alone_and_together(endpoint, 40)
    assert [choice["token_ids"] for choice in together] == [choice["token_ids"] for choice in alone]
    assert [choice["text"] for choice in together] == [choice["text"] for choice in alone]
    assert len({choice["text"] for choice in alone}) > 8


@pytest.mark.asyncio
async def test_an_adapter_its_base_and_an_encoder_decoder_answer_at_once(
    endpoint: Endpoint, chat_model: Path, t5_model: Path, adapters: Path
) -> None:
    """Each says what its model says by itself, streamed to OpenAI's client, whoever else is asked at the same time."""
    bare = load_model(chat_model, torch.float32)
    alone = {"tiny": bare, "rhymes": merged(bare, adapters / "rhymes"), "t5": load_model(t5_model, torch.float32)}
    folders = {"tiny": chat_model, "rhymes": chat_model, "t5": t5_model}
    async with openai.AsyncOpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:

        async def streamed(name: str, question: str) -> str:
            more = {"ignore_eos": True}
            stream = await client.completions.create(model=name, prompt=question, max_tokens=15, stream=True, extra_body=more)
            return "".join([chunk.choices[0].text async for chunk in stream])

        questions = [(name, f"{number} questions about the film") for number in range(4) for name in alone]
        together = await asyncio.gather(*(streamed(*one) for one in questions))
    assert len(set(together)) > 8
    for (name, question), text in zip(questions, together, strict=True):
        layout = layout_beside(folders[name])
        (ids,) = generate(alone[name], [layout.encode_prompt(question)], max_new_tokens=15, stop_ids=())
        assert layout.tokenizer.decode(ids, skip_special=True) == text


@pytest.mark.asyncio
@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_slot(endpoint: Endpoint, stream: bool) -> None:
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as http:

        async def running() -> int:
            return int((await http.get("/stats")).json()["running"])

        request_body = {"prompt": "Once upon a time", "max_tokens": 2000, "ignore_eos": True, "stream": stream}

        async def leave_early() -> None:
            async with httpx.AsyncClient(base_url=endpoint.url, timeout=60) as leaving:
                if not stream:
                    await leaving.post("/v1/completions", json=request_body)
                async with leaving.stream("POST", "/v1/completions", json=request_body) as response:
                    async for _ in response.aiter_lines():
                        await asyncio.Event().wait()

        assert await running() == 0
        client = asyncio.create_task(leave_early())
        while await running() == 0:
            assert not client.done()
            await asyncio.sleep(0.01)
        assert await running() == 1
        client.cancel()
        await asyncio.gather(client, return_exceptions=True)
        left = time.monotonic()
        while await running():
            assert time.monotonic() - left < 1.0
            await asyncio.sleep(0.01)
        assert (await http.get("/stats")).json()["queued"] == 0


@pytest.mark.asyncio
async def test_more_than_running_and_queued_is_status_429(endpoint: Endpoint) -> None:
    request_body = {"prompt": "a", "max_tokens": 300, "ignore_eos": True}
    async with httpx.AsyncClient(base_url=endpoint.url, timeout=120) as http:
        for _ in range(20):  # on a busy machine the first may have left before the last come
            responses = await asyncio.gather(*(http.post("/v1/completions", json=request_body) for _ in range(40)))
            statuses = sorted(response.status_code for response in responses)
            assert statuses.count(200) >= 20  # 16 run and 4 wait; some of the others come when the first have left
            if 429 in statuses:
                break
    assert set(statuses) == {200, 429}


def test_the_endpoints_numbers_are_among_rays_metrics(endpoint: Endpoint) -> None:
    """Where Prometheus looks, and under the names that the dashboard asks for."""
    request_body = {"prompt": "a", "max_tokens": 3, "ignore_eos": True}
    for _ in range(2):  # the second finds the first one's prompt in memory
        assert (
            httpx.post(f"{endpoint.url}/v1/completions", json=request_body | {"prompt": "a b c " * 40}, timeout=60).status_code
            == 200
        )
    assert httpx.post(f"{endpoint.url}/v1/completions", json=request_body | {"n": 100}, timeout=60).status_code == 400
    [node] = [node for node in ray.nodes() if node["Alive"]]
    replica = httpx.get(f"{endpoint.url}/stats").json()["replica"]
    deadline = time.monotonic() + 60
    series: dict[str, set[str]] = {}
    statuses: set[str] = set()
    while time.monotonic() < deadline:
        if exported_names() <= series.keys() and statuses >= {"200", "400"}:
            break
        time.sleep(0.5)
        text = httpx.get(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics").text
        for line in text.splitlines():
            if line.startswith("ray_apprentice_") and 'model="tiny"' in line and f'replica="{replica}"' in line:
                series.setdefault(line.partition("{")[0], set()).add(line)
                statuses |= set(re.findall(r'requests_total.*status="(\d+)"', line))
    assert exported_names() <= series.keys()
    assert statuses >= {"200", "400"}
    assert httpx.get(f"{endpoint.url}/metrics").status_code == 404  # it would be one replica's alone


def test_a_second_endpoint_in_the_same_ray_is_refused(endpoint: Endpoint, chat_model: Path) -> None:
    with pytest.raises(ServingError, match="serves something already"):
        start(chat_model, Serving(port=0), model_name="other")
    taken = int(endpoint.url.rsplit(":", 1)[1])
    with pytest.raises(ServingError, match=rf"port {taken} on 127\.0\.0\.1 cannot be used \(Address already in use\)"):
        check(chat_model, Serving(port=taken))


def test_what_is_wrong_is_said_before_anything_starts(tiny_model: Path, chat_model: Path, tmp_path: Path) -> None:
    """None of these needs Ray, and none starts it."""
    with pytest.raises(ContractError, match=r"has no prompt contract \(apprentice\.json\)"):
        check(tiny_model, Serving(port=0))
    contract = read_contract(chat_model)
    check(tiny_model, Serving(port=0), contract)
    with pytest.raises(ServingError, match=r"'0\.0\.0\.0' is not this machine alone"):
        check(chat_model, Serving(host="0.0.0.0", port=0))
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        with pytest.raises(ServingError, match=r"choose another with serving\.port"):
            start(chat_model, Serving(port=listening.getsockname()[1]), model_name="tiny")
    changed = tmp_path / "changed"
    shutil.copytree(chat_model, changed)
    with (changed / "model.safetensors").open("ab") as weights:
        weights.write(b"\0")
    with pytest.raises(ContractError, match="are not those its contract was written for"):
        check(changed, Serving(port=0))


def test_the_config_file_is_one_of_ray_serves_and_names_the_builder() -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load((ROOT / "serve" / "config.yaml").read_text()))
    assert config.http_options.host == "127.0.0.1"
    (app,) = config.applications
    AppArguments.model_validate(app.args)
    module, name = app.import_path.split(":")
    spec = importlib.util.spec_from_file_location(module, ROOT / f"{module.replace('.', '/')}.py")
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    assert getattr(loaded, name) is application


def test_arguments_build_the_same_application(chat_model: Path, tiny_model: Path) -> None:
    built = application({"model": str(chat_model), "max_running": 3, "replicas": {"min": 1, "max": 2}, "cpus": 2})
    options = built._bound_deployment
    assert [offer.name for offer in options.init_args[0]] == ["tiny"]  # the run's name, from the contract
    assert options.ray_actor_options["num_cpus"] == 2
    assert options._deployment_config.autoscaling_config.max_replicas == 2
    assert options.init_args[4] is None
    assert options.init_args[6] == []
    assert options.init_args[7] is False
    assert application({"model": str(chat_model), "insecure": True})._bound_deployment.init_args[7] is True
    more = application({"model": str(chat_model), "beside": [str(tiny_model)]})._bound_deployment
    assert [offer.name for offer in more.init_args[0]] == ["tiny", tiny_model.name]
    with pytest.raises(ModelError, match=r"it has no config\.json"):
        application({"model": str(chat_model), "beside": [str(chat_model.parent)]})
    with pytest.raises(ServingError, match="max_runing: Extra inputs are not permitted"):
        application({"model": str(chat_model), "max_runing": 3})


def test_a_model_over_several_gpus_is_one_placement_group_of_each_replica(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object())  # vLLM is installed
    arguments = {
        "model": str(chat_model),
        "tensor_parallel": 2,
        "gpus": 2,
        "cpus": 4,
        "memory_gb": 8,
        "replicas": {"min": 2, "max": 2},
    }
    built = application(arguments)._bound_deployment
    replica = built._replica_config
    assert replica.placement_group_bundles == [{"CPU": 4, "GPU": 2, "memory": 8e9}]
    assert replica.placement_group_strategy == "STRICT_PACK"
    assert {name: built.ray_actor_options[name] for name in ("num_cpus", "num_gpus", "memory")} == {
        "num_cpus": 4,
        "num_gpus": 2,
        "memory": 8 * 10**9,
    }
    assert built.init_args[8] is True  # on GPUs
    with pytest.raises(ServingError, match="gpus 1 are not the 2 of tensor_parallel; give both one number"):
        application(arguments | {"gpus": 1})
    with pytest.raises(ServingError, match="tensor_parallel 2 asks for GPUs, and there are none here"):
        application(arguments | {"gpus": 0})


def test_replicas_on_a_part_of_a_gpu_leave_the_rest_of_its_memory(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object())  # vLLM is installed
    engines = {
        gpus: application({"model": str(chat_model), "gpus": gpus})._bound_deployment.init_args[1].engine for gpus in (0.5, 1)
    }
    assert engines == {0.5: "transformers", 1: "auto"}


def test_the_weights_are_read_once_before_the_start(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def hashed(folder: Path) -> str:
        read.append(folder)
        contract = read_contract(folder)
        assert contract is not None
        return contract.weights_sha256

    monkeypatch.setattr(prompt_contract, "weights_sha256", hashed)
    monkeypatch.setattr(deployment, "serve_is_running", lambda: True)
    with pytest.raises(ServingError, match="serves something already"):
        start(chat_model, Serving(port=0), model_name="tiny")
    assert read == [chat_model]
    with pytest.raises(ServingError, match="serves something already"):
        start(chat_model, Serving(port=0), model_name="tiny", is_checked=True)
    assert read == [chat_model]


def test_a_replica_decodes_with_the_threads_that_it_is_given(chat_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the key; else by the person's OMP_NUM_THREADS, which Ray sets anew in its workers; else by what it reserves."""
    built = application({"model": str(chat_model), "threads": 3, "cpus": 2})._bound_deployment
    assert (built.init_args[3], built.ray_actor_options["num_cpus"]) == (3, 2)
    monkeypatch.setenv("OMP_NUM_THREADS", "7")  # in the task that builds an application it is Ray's
    assert application({"model": str(chat_model), "cpus": 2})._bound_deployment.init_args[3] == 2
    assert deployment._threads_of_environment() == 7
    for said in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", said)
        assert deployment._threads_of_environment() is None


def test_arguments_name_keys_and_tasks(chat_model: Path, tmp_path: Path) -> None:
    _, entry = new_key("anna")
    (tmp_path / "keys.yaml").write_text(f"keys:\n{entry}")
    own = yaml.safe_load(library()["ag_news"].read_text()) | {"name": "my_news"}
    (tmp_path / "my_news.yaml").write_text(yaml.safe_dump(own))
    arguments = {"model": str(chat_model), "tasks": [str(tmp_path / "my_news.yaml")], "keys_file": str(tmp_path / "keys.yaml")}
    options = application(arguments)._bound_deployment
    assert options.init_args[4] == tmp_path / "keys.yaml"
    assert [task.name for task in options.init_args[6]] == ["my_news"]
    with pytest.raises(ServingError, match=r"the keys file .*none\.yaml cannot be read"):
        application(arguments | {"keys_file": str(tmp_path / "none.yaml")})
    with pytest.raises(TaskError, match=r"other\.yaml does not exist"):
        application(arguments | {"tasks": [str(tmp_path / "other.yaml")]})
