"""Endpoints that need a start of their own: in bf16, and those that do not come up."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

import pytest
import ray
import torch
from ray import serve
from ray.serve.config import HTTPOptions

from apprentice.errors import ResourcesError, ServingError
from apprentice.models.loading import load_model
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Replicas, Serving
from apprentice.serve.deployment import APP_NAME, application, start
from tests.serve.company import QUESTIONS, alone_and_together

pytestmark = pytest.mark.slow


@pytest.mark.asyncio
async def test_bfloat16_replies_part_only_where_two_tokens_are_close(ray_cluster: None, chat_model: Path) -> None:
    serving = Serving(port=0, max_running=16, context=512)
    with await asyncio.to_thread(lambda: start(chat_model, serving, model_name="tiny", dtype="bfloat16", cpus=1)) as endpoint:
        alone, together = await alone_and_together(endpoint, 40)
    model = load_model(chat_model, torch.bfloat16)
    tokenizer = Tokenizer(chat_model)
    checked = 0
    for question, one, other in zip(QUESTIONS, alone, together, strict=True):
        pairs = zip(one["token_ids"], other["token_ids"], strict=True)
        parting = next((place for place, (a, b) in enumerate(pairs) if a != b), None)
        checked += 1
        if parting is not None:
            ids = tokenizer.encode(question) + one["token_ids"][:parting]
            with torch.inference_mode():
                best = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].float().topk(2).values
            assert float(best[0] - best[1]) < 0.25
    assert checked == 16


def test_an_endpoint_that_cannot_start_leaves_nothing(ray_cluster: None, chat_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ResourcesError, match=r"2 replica\(s\) need 6 CPUs and the cluster has 4 free"):
        start(chat_model, Serving(port=0, replicas=Replicas(min=2, max=2)), model_name="tiny", cpus=3, timeout_s=5)
    broken = tmp_path / "broken"
    shutil.copytree(chat_model, broken)
    config = (broken / "config.json").read_text()
    (broken / "config.json").write_text(config.replace('"num_hidden_layers": 2', '"num_hidden_layers": 3'))
    with pytest.raises(ServingError, match=r"the engine does not start: .*lacks weights"):
        start(broken, Serving(port=0), model_name="tiny", cpus=1)
    with pytest.raises(ValueError, match="Failed to look up actor"):
        ray.get_actor("SERVE_CONTROLLER_ACTOR", namespace="serve")


def test_a_config_file_opens_no_endpoint_without_keys(ray_cluster: None, chat_model: Path) -> None:
    """As `serve run serve/config.yaml` with another host would: the builder is not told the address, so the replicas look."""
    serve.start(proxy_location="HeadOnly", http_options=HTTPOptions(host="0.0.0.0", port=8199))
    try:
        with pytest.raises(RuntimeError, match="Deploying application apprentice failed"):
            serve.run(application({"model": str(chat_model), "dtype": "float32"}), name=APP_NAME)
        state = serve.status().applications[APP_NAME]
        message = " ".join(deployment.message for deployment in state.deployments.values())
        assert "the host '0.0.0.0' is not this machine alone, and no keys guard the endpoint" in message
    finally:
        serve.shutdown()
