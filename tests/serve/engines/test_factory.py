"""What is refused before an engine starts."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from apprentice.errors import ServingError
from apprentice.model_pool import engine_choice
from apprentice.pretrained.architecture import kv_values_per_token, model_config
from apprentice.recipe import Serving
from apprentice.serve.deployment import check
from apprentice.serve.engines import transformers as transformers_engine
from apprentice.serve.replica import ModelSpec, concurrent_requests, start_models

WITH_VLLM = Serving(port=0, engine="vllm")


def test_vllm_decodes_no_sequence_to_sequence_model(t5_model: Path) -> None:
    with pytest.raises(ServingError, match=r"engine vllm decodes causal models only, and .* is a sequence-to-sequence model; use"):
        check(t5_model, WITH_VLLM)
    check(t5_model, Serving(port=0))


def test_vllm_would_leave_out_what_lies_beside_the_weights(chat_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    (folder / "adapter").mkdir()
    with pytest.raises(ServingError, match=r"has an adapter beside its weights .* vLLM would leave it out"):
        check(folder, WITH_VLLM)


def test_vllm_is_an_extra(chat_model: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        check(chat_model, WITH_VLLM)
        return
    with pytest.raises(ServingError, match=r"needs the package vllm, which is not installed; pip install 'apprentice\[vllm\]'"):
        check(chat_model, WITH_VLLM)


def test_a_replica_decodes_as_many_as_its_memory_holds_in_the_type_that_it_keeps(
    chat_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = kv_values_per_token(model_config(chat_model))
    assert numbers is not None
    context, replies = 256, 12  # of half a context, in float32
    memory = {"kv_memory_gb": numbers * 4 * context * replies / 2 / 1e9, "context": context, "max_running": 64}
    assert concurrent_requests(chat_model, Serving(**memory), "auto", on_gpu=False) == replies
    assert concurrent_requests(chat_model, Serving(**memory), "auto", on_gpu=True) == 2 * replies
    assert concurrent_requests(chat_model, Serving(**memory), "float32", on_gpu=True) == replies
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object())  # vLLM is installed
    assert concurrent_requests(chat_model, Serving(**memory, engine="vllm"), "auto", on_gpu=False) == 2 * replies
    assert concurrent_requests(chat_model, Serving(max_running=64), "auto", on_gpu=False) == 64
    assert concurrent_requests(chat_model, Serving(**memory), "auto", on_gpu=False, engines=2) == replies // 2


def test_an_encoder_decoder_keeps_keys_and_values_of_prompt_and_reply(t5_model: Path) -> None:
    numbers = kv_values_per_token(model_config(t5_model))
    assert numbers is not None
    context, replies = 256, 12
    serving = Serving(kv_memory_gb=2 * numbers * 4 * context * replies / 2 / 1e9, context=context, max_running=64)
    assert concurrent_requests(t5_model, serving, "float32", on_gpu=False) == replies
    engine = transformers_engine.TransformersEngine(
        t5_model, dtype="float32", max_running=64, max_queued=1, context=context, threads=1, kv_bytes=serving.kv_bytes
    )
    assert engine.stats().kv_tokens == pytest.approx(replies * context, rel=0.01)  # of both sides, each half a context
    engine.close()


def test_engines_side_by_side_share_threads_and_memory(
    chat_model: Path, plain_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    numbers = kv_values_per_token(model_config(chat_model))
    assert numbers is not None
    threads: list[int] = []
    monkeypatch.setattr(transformers_engine.os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr(transformers_engine.torch, "set_num_threads", threads.append)
    room = 1000  # tokens in float32
    serving = Serving(kv_memory_gb=room * numbers * 4 / 1e9, context=100, max_running=64)
    offers = [ModelSpec("one", chat_model), ModelSpec("other", plain_model)]
    models = start_models(offers, [offer.folder for offer in offers], serving, "float32", 4)
    try:
        assert threads == [2, 2]
        assert [model.engine.stats().kv_tokens for model in models] == [room // 2] * 2
    finally:
        for model in models:
            model.engine.close()
