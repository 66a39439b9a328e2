"""Servers that show their prompts in the ways of llama.cpp, vLLM, TGI and Ollama, right ones and ones that drifted."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from apprentice import pipeline
from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import ContractError, EvaluationError
from apprentice.models.greedy import reply_greedily
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import read_contract

Routes = dict[str, Callable[[dict[str, Any]], Any]]


@contextmanager
def serve(routes: Routes) -> Iterator[str]:
    """A server that answers `routes`, path → function of the body, with JSON; other paths do not exist."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: dict[str, Any]) -> None:
            route = routes.get(self.path.partition("?")[0])
            data = json.dumps(route(body) if route else {"error": "no such route"}).encode()
            self.send_response(200 if route else 404)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *values: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()


@pytest.fixture(scope="module", params=["chat"])
def exported(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(tiny_model, folder)
    values = {"name": "r", "model": {"base": str(tiny_model)}, "data": {"tasks": ["t"]}, "training": {"steps": 1}}
    recipe = Recipe.model_validate(values)
    make_contract(recipe, layout_of(recipe, Tokenizer(folder)), folder).write(folder)
    return folder


class Model:
    """What a server computes with: the model in a folder, and perhaps another template or another way to end a reply."""

    def __init__(self, folder: Path, template: str | None = None, *, stops: bool = True) -> None:
        self.tokenizer = Tokenizer(folder, template)
        contract = read_contract(folder)
        assert contract is not None
        self.layout = Layout("chat", self.tokenizer, version=1, day=contract.date, date=contract.date)
        self.folder, self.stop_ids = folder, contract.stop_ids if stops else ()

    def template(self, messages: list[dict[str, str]]) -> str:
        return self.layout.chat_prompt(messages)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        ids = body["prompt"]
        forced = [int(token) for token in body.get("logit_bias", {})]
        if forced:
            is_stop = forced[0] in self.stop_ids
            return {"choices": [{"text": "" if is_stop else "xxx", "finish_reason": "stop" if is_stop else "length"}]}
        [reply] = reply_greedily(self.folder, [ids], self.stop_ids, body["max_tokens"])
        return {"choices": [{"text": self.tokenizer.decode(reply.ids), "finish_reason": "length"}]}


def llama_cpp(model: Model) -> Routes:
    return {
        "/v1/models": lambda _: {"data": [{"id": "m"}]},
        "/props": lambda _: {"default_generation_settings": {}, "chat_template": model.tokenizer.chat_template},
        "/apply-template": lambda body: {"prompt": model.template(body["messages"])},
        "/tokenize": lambda body: {"tokens": model.tokenizer.encode(body["content"])},
        "/v1/completions": model.complete,
    }


def vllm(model: Model) -> Routes:
    def tokenize(body: dict[str, Any]) -> dict[str, Any]:
        text = body["prompt"] if "prompt" in body else model.template(body["messages"])
        return {"tokens": model.tokenizer.encode(text), "count": 0, "max_model_len": 9}

    return {"/v1/models": lambda _: {"data": [{"id": "m"}]}, "/tokenize": tokenize, "/v1/completions": model.complete}


def verdicts(result: dict[str, Any], check: str) -> list[str]:
    return [finding["verdict"] for finding in result["findings"] if finding["check"] == check]


@pytest.mark.parametrize("kind", [llama_cpp, vllm])
def test_a_server_that_serves_the_folder_as_it_is(exported: Path, kind: Callable[[Model], Routes]) -> None:
    """Only the prompt with control tokens in a user's text differs: these servers take them for tokens."""
    with serve(kind(Model(exported))) as url:
        result = pipeline.verify_contract(url, str(exported))
    assert result["kind"] == {"llama_cpp": "llama.cpp", "vllm": "vLLM"}[kind.__name__]
    assert verdicts(result, "token ids").count("same") == 5
    [odd] = [finding for finding in result["findings"] if finding["verdict"] == "drifted"]
    assert odd["check"] == "token ids"
    assert odd["subject"].startswith("Say <")
    assert verdicts(result, "chat template") == ["same" if kind is llama_cpp else "cannot be seen"]
    assert set(verdicts(result, "stops")) == set(verdicts(result, "special tokens")) == {"same"}
    assert verdicts(result, "greedy text") == ["same"] * 6


@pytest.mark.parametrize("kind", [llama_cpp, vllm])
def test_another_template_and_another_stop(exported: Path, kind: Callable[[Model], Routes]) -> None:
    template = Tokenizer(exported).chat_template
    assert template is not None
    with serve(kind(Model(exported, "{{ '' }}" + template + "{{ ' ' }}", stops=False))) as url:
        result = pipeline.verify_contract(url, str(exported / "apprentice.json"), model="m")
    assert set(verdicts(result, "token ids")) == set(verdicts(result, "stops")) == {"drifted"}
    assert verdicts(result, "chat template") == ["drifted" if kind is llama_cpp else "cannot be seen"]


def test_what_a_server_does_not_show_is_said_to_be_unseen(exported: Path, tmp_path: Path) -> None:
    """Of Ollama the number of tokens is known alone."""
    model = Model(exported)

    def chat(body: dict[str, Any]) -> dict[str, Any]:
        count = len(model.tokenizer.encode(model.template(body["messages"])))
        return {"usage": {"prompt_tokens": count + (body["messages"][-1]["content"] == "Name three colours.")}}

    routes: Routes = {
        "/v1/models": lambda _: {"data": [{"id": "m"}]},
        "/api/version": lambda _: {"version": "0.9"},
        "/v1/chat/completions": chat,
    }
    shutil.copy(exported / "apprentice.json", tmp_path)
    with serve(routes) as url:
        result = pipeline.verify_contract(url, str(tmp_path / "apprentice.json"))
    assert result["kind"] == "Ollama"
    assert verdicts(result, "token ids")[:3] == ["cannot be seen", "drifted", "cannot be seen"]
    others = {finding["verdict"] for finding in result["findings"] if finding["check"] != "token ids"}
    assert others == {"cannot be seen"}
    assert "counted" in result["findings"][2]["detail"]


def test_tgi(exported: Path) -> None:
    model = Model(exported)
    routes: Routes = {
        "/v1/models": lambda _: {"data": [{"id": "m"}]},
        "/info": lambda _: {"docker_label": "sha"},
        "/chat_tokenize": lambda body: {
            "tokenize_response": [{"id": token} for token in [1, *model.tokenizer.encode(model.template(body["messages"]))]]
        },
        "/tokenize": lambda body: [{"id": token} for token in model.tokenizer.encode(body["inputs"])],
    }
    with serve(routes) as url:
        result = pipeline.verify_contract(url, str(exported))
    first = next(finding for finding in result["findings"] if finding["check"] == "token ids")
    assert (result["kind"], first["detail"]) == ("TGI", "[1] stand before the prompt; a start token is added twice?")


def test_nobody_answers(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match="does not answer"):
        pipeline.verify_contract("http://127.0.0.1:9", str(exported))
    with serve({}) as url, pytest.raises(EvaluationError, match="lists no models"):
        pipeline.verify_contract(url, str(exported))
    with pytest.raises(ContractError, match="is no contract"):
        pipeline.verify_contract("http://127.0.0.1:9", str(tmp_path), storage=str(tmp_path))
    with pytest.raises(ContractError, match="is neither the address of a server"):
        pipeline.verify_contract(str(tmp_path / "gone"), str(exported))


def test_a_server_that_refuses_everything_is_not_taken_for_a_right_one(exported: Path) -> None:
    """As with a wrong key, or another model's name: nothing was seen, so the exit code must not be 0."""
    with serve({}) as url, pytest.raises(EvaluationError, match="refuses every request for the model 'm'"):
        pipeline.verify_contract(url, str(exported), model="m")


def test_a_bias_without_effect_shows_nothing(exported: Path) -> None:
    """A short reply ends by itself, also at a server that ignores `logit_bias`."""
    routes = vllm(Model(exported)) | {"/v1/completions": lambda _: {"choices": [{"text": "Yes", "finish_reason": "stop"}]}}
    with serve(routes) as url:
        result = pipeline.verify_contract(url, str(exported))
    assert set(verdicts(result, "stops")) == {"cannot be seen"}


def test_our_endpoint_without_a_hash_of_weights(exported: Path) -> None:
    """It serves a folder with another's contract, so that it does not know of the weights."""
    contract = read_contract(exported)
    assert contract is not None
    routes: Routes = {
        "/v1/models": lambda _: {"data": [{"id": "m"}]},
        "/v1/contract": lambda _: contract.for_other_weights().model_dump(mode="json"),
    }
    with serve(routes) as url:
        result = pipeline.verify_contract(url, str(exported))
    assert (result["kind"], verdicts(result, "weights"), result["drifted"]) == ("apprentice", ["cannot be seen"], 0)
