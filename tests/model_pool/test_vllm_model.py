"""Arguments for vLLM, and a worker's model over a recording stand-in for its package."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.errors import ModelError, ResourcesError
from apprentice.inference.generation_request import NotFiniteError
from apprentice.model_pool import vllm_model
from apprentice.model_pool.host_memory import GIB
from apprentice.model_pool.vllm_arguments import find_free_share, vllm_arguments
from apprentice.model_pool.vllm_model import VllmModel
from tests.support.big_models import big_llama
from tests.support.vllm_signatures import NAMES, SamplingParams

SETTINGS: dict[str, Any] = {"dtype": "auto", "max_running": 32, "context": 8192, "kv_bytes": None, "trust": False}


def test_an_8b_model_on_one_gpu(tmp_path: Path) -> None:
    folder = big_llama(tmp_path, "8b")
    assert vllm_arguments(folder, device="cuda", **SETTINGS) == {
        "model": str(folder),
        "dtype": "bfloat16",
        "max_model_len": 8192,
        "max_num_seqs": 32,
        "kv_cache_memory_bytes": None,  # what the weights leave free
        "load_format": "safetensors",
        "trust_remote_code": False,
        "generation_config": "vllm",
    }


def test_a_70b_model_over_8_gpus(tmp_path: Path) -> None:
    folder = big_llama(tmp_path, "70b")
    arguments = vllm_arguments(folder, device="cuda", **SETTINGS, tensor_parallel=8)
    assert arguments["tensor_parallel_size"] == 8
    assert arguments["distributed_executor_backend"] == "mp"  # in a placement group vLLM's default would be Ray's workers
    assert arguments["kv_cache_memory_bytes"] is None
    bounded = vllm_arguments(folder, device="cuda", **SETTINGS | {"kv_bytes": 64 * 10**9}, tensor_parallel=8)
    assert bounded["kv_cache_memory_bytes"] == 8 * 10**9  # of each GPU
    assert set(bounded) <= set(NAMES["AsyncEngineArgs"])


def test_engines_beside_each_other_share_a_gpu(tmp_path: Path) -> None:
    """Also where their KV memory is given: vLLM 0.29 refuses to start where less than its share of the GPU is free."""
    for kv_bytes in (None, 10**9):
        settings = SETTINGS | {"kv_bytes": kv_bytes}
        arguments = vllm_arguments(big_llama(tmp_path, "1b"), device="cuda", **settings, engines=2)
        assert (arguments["gpu_memory_utilization"], arguments["kv_cache_memory_bytes"]) == (0.46, kv_bytes)
    assert set(arguments) <= set(NAMES["AsyncEngineArgs"])


def test_on_a_cpu_the_kv_cache_holds_the_contexts_in_each_process(tmp_path: Path) -> None:
    """A process of a split model has its part of the 8 key heads, and at least one."""
    folder = big_llama(tmp_path, "8b")
    settings = SETTINGS | {"dtype": "bfloat16", "context": 1000, "max_running": 2}
    a_token = 2 * 32 * 8 * 128 * 2  # keys and values, layers, heads, width, bytes
    sizes = {
        split: vllm_arguments(folder, device="cpu", **settings, tensor_parallel=split)["kv_cache_memory_bytes"]
        for split in (1, 2, 8, 16)
    }
    assert sizes == {1: a_token * 2048, 2: a_token * 1024, 8: a_token * 256, 16: a_token * 256}


class StandInLLM:
    """Replies to each prompt with its first id and the stop id 2; scores each token by minus its position."""

    made: dict[str, Any]
    failure: Exception | None = None
    logprob = -0.5

    def __init__(self, **arguments: Any) -> None:
        assert set(arguments) <= {*NAMES["LLM"], *NAMES["AsyncEngineArgs"]}
        if self.failure is not None:
            raise self.failure
        type(self).made = arguments
        self.calls: list[Any] = []
        self.samplings: list[SamplingParams] = []

    def collective_rpc(self, method: str, *, kwargs: dict[str, Any]) -> None:
        self.calls.append((method, kwargs))

    def reset_prefix_cache(self) -> None:
        self.calls.append(("reset_prefix_cache", {}))

    def generate(self, prompts: list[dict[str, Any]], samplings: list[SamplingParams], *, use_tqdm: bool) -> list[Any]:
        outputs = []
        for prompt, sampling in zip((prompt["prompt_token_ids"] for prompt in prompts), samplings, strict=True):
            self.samplings.append(sampling)
            ids = [prompt[0], 2][: sampling.max_tokens]
            scores = [{id: SimpleNamespace(logprob=self.logprob)} for id in ids]
            reply = SimpleNamespace(token_ids=ids, logprobs=scores, finish_reason="stop" if ids[-1] == 2 else "length")
            places = [None, *({id: SimpleNamespace(logprob=-float(place))} for place, id in enumerate(prompt[1:], 1))]
            outputs.append(SimpleNamespace(outputs=[reply], prompt_logprobs=places))
        return outputs


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> VllmModel:
    module = ModuleType("vllm")
    vars(module).update({"LLM": StandInLLM, "SamplingParams": SamplingParams})
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(vllm_model, "guard_children", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ((76 - 32 * number) * GIB, 80 * GIB))
    for name in ("VLLM_NO_USAGE_STATS", "VLLM_LOGGING_LEVEL", "VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        monkeypatch.setenv(name, "1")
    return VllmModel(tiny_model, device="cuda", dtype="bfloat16", context=600, threads=1, tensor_parallel=2)


def test_a_worker_gives_vllm_its_gpus_and_limits(model: VllmModel) -> None:
    made = StandInLLM.made
    assert (made["tensor_parallel_size"], made["max_model_len"], made["max_num_batched_tokens"]) == (2, 601, 2048)
    assert model.generate([[5, 6], [7]], max_new_tokens=4, stop_ids={2}) == [[5], [7]]
    assert model.generate([[5, 6]], max_new_tokens=1, stop_ids={2}) == [[5]]
    assert model.generate([], max_new_tokens=1, stop_ids={2}) == []


def test_it_takes_what_is_free_of_the_gpu_with_the_least(model: VllmModel, tmp_path: Path) -> None:
    """Of 80 GiB 44 are free on the second; one stays for the process's context. Where nearly all is free, vLLM's share stays."""
    assert StandInLLM.made["gpu_memory_utilization"] == round(43 / 80, 3)
    assert find_free_share(3 * GIB) == 40 / 80
    folder = big_llama(tmp_path, "1b")
    assert "gpu_memory_utilization" not in vllm_arguments(folder, device="cuda", **SETTINGS, free_share=0.97)
    assert vllm_arguments(folder, device="cuda", **SETTINGS, engines=2, free_share=0.3)["gpu_memory_utilization"] == 0.3
    with pytest.raises(ResourcesError, match=r"^44\.0 of a GPU's 80\.0 GiB are free, and what runs there beside vLLM needs 51\.0;"):
        find_free_share(50 * GIB)


def test_replies_are_sampled_with_seeds_and_new_weights_end_old_keys_and_values(model: VllmModel, tmp_path: Path) -> None:
    replies = model.sample([[5, 6], [7]], [3, 2**63 + 4], max_new_tokens=4, stop_ids={2})
    assert replies == [([5, 2], True), ([7, 2], True)]
    assert [(each.seed, each.temperature, each.stop_token_ids) for each in model._llm.samplings] == [(3, 1.0, [2]), (4, 1.0, [2])]
    assert model.sample([[5, 6]], [1], max_new_tokens=1, stop_ids={2}) == [([5], False)]
    model.load_weights(tmp_path)
    assert model._llm.calls == [("reload_weights", {"weights_path": str(tmp_path)}), ("reset_prefix_cache", {})]


def test_choices_are_scored_by_their_own_tokens_in_order(model: VllmModel) -> None:
    assert model.choice_logprobs([[5, 6], [7]], [[[1], [1, 2]], [[3, 4, 5]]]) == [[-2.0, -5.0], [-6.0]]


def test_logits_that_are_not_finite_are_told(model: VllmModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInLLM, "logprob", float("nan"))
    with pytest.raises(NotFiniteError):
        model.generate([[5, 6]], max_new_tokens=1, stop_ids={2})


def test_a_model_that_vllm_refuses_is_one_sentence(model: VllmModel, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StandInLLM, "failure", ValueError("no\nroom."))
    with pytest.raises(
        ModelError, match=r"^vLLM does not start with .*: no room; its log says why\..* or use serving\.engine transformers\.$"
    ):
        VllmModel(tiny_model, device="cuda", dtype="bfloat16", context=600, threads=1)
