"""The scenarios of large models, as far as a machine without a GPU goes: sizes, placement, and the engine's arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from apprentice.errors import ResourcesError
from apprentice.model_pool import engine_choice, model
from apprentice.model_pool.engine_choice import choose_engine
from apprentice.model_pool.host_memory import GIB
from apprentice.model_pool.model import plan_pool
from apprentice.model_pool.pool import FreeResources
from apprentice.model_pool.vllm_arguments import vllm_arguments
from apprentice.preflight.hardware.hardware_report import report_on_hardware
from apprentice.pretrained.architecture import kv_values_per_token, model_config
from apprentice.recipe import Recipe, Serving, find_recipe, load_recipe
from apprentice.serve.placement import place_replica
from apprentice.tasks.registry import select_tasks
from tests.conftest import ROOT
from tests.support.big_models import big_llama, big_t5

PAGE = (ROOT / "docs" / "guides" / "large_models.md").read_text(encoding="utf-8")
MEMORY_PAGE = (ROOT / "docs" / "guides" / "memory.md").read_text(encoding="utf-8")
GPU_BYTES = 80 * 10**9
NODE = {"CPU": 112.0, "GPU": 8.0, "memory": 1000.0 * GIB}
PARAMETERS = {"8b": 8_030_261_248, "70b": 70_553_706_496}
FREE = FreeResources(112, 112, 8, 1000 * GIB, 8, GPU_BYTES)


@pytest.fixture(params=["8b", "70b"])
def scenario(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path, Recipe]:
    """Size, model folder (a config.json without weights) and recipe; vLLM is installed."""
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(model, "count_parameters", lambda _: PARAMETERS[request.param])
    return request.param, big_llama(tmp_path, request.param), load_recipe(find_recipe(f"large/serve_{request.param}"))


def test_serving(scenario: tuple[str, Path, Recipe]) -> None:
    size, folder, recipe = scenario
    serving = recipe.serving
    choice = choose_engine(serving, folder, on_gpu=True)
    assert choice.name == "vllm"
    weights = model.weight_bytes(folder, recipe.model.dtype, gpu=True)
    placement = place_replica(serving, [NODE], None, weights, engines=[choice.name], gpu_bytes=GPU_BYTES)
    assert placement.gpus == {"8b": 1, "70b": 8}[size]
    assert bool(placement.group_options) is (size == "70b")
    arguments = vllm_arguments(
        folder,
        device="cuda",
        dtype=recipe.model.dtype,
        max_running=serving.max_running,
        context=serving.context,
        kv_bytes=serving.kv_bytes,
        trust=False,
        tensor_parallel=serving.tensor_parallel,
    )
    assert (arguments["max_num_seqs"], arguments["max_model_len"], arguments["dtype"]) == (serving.max_running, 8192, "bfloat16")
    assert arguments.get("tensor_parallel_size", 1) == placement.gpus
    # Beside the weights each GPU has room for at least 32 whole contexts.
    numbers = kv_values_per_token(model_config(folder))
    assert numbers is not None
    free = 0.92 * GPU_BYTES * placement.gpus - weights
    assert free / (numbers * 2 * serving.context) > 32


def test_evaluating(scenario: tuple[str, Path, Recipe]) -> None:
    """8B has a worker on each GPU of a node, 70B one worker over all of them."""
    size, folder, recipe = scenario
    choice = choose_engine(recipe.serving, folder, on_gpu=True)
    pool, words = plan_pool(folder, recipe.model.dtype, choice, recipe.serving, FREE, 100)
    assert (pool.workers, pool.gpus, pool.engine) == {"8b": (8, 1, "vllm"), "70b": (1, 8, "vllm")}[size]
    reason = {"8b": "a causal model on a GPU, and vLLM is installed", "70b": "serving.tensor_parallel 8"}[size]
    assert words == f"loading on {pool.workers} worker{'s' if pool.workers > 1 else ''}, engine vllm: {reason}"
    assert pool.workers * pool.memory < 100 * GIB


def test_a_70b_model_on_one_gpu_is_one_sentence_before_anything_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "count_parameters", lambda _: PARAMETERS["70b"])
    folder, choice = big_llama(tmp_path, "70b"), engine_choice.EngineChoice("vllm", "")
    with pytest.raises(ResourcesError, match=r"takes 131\.4 GiB, all of it in each GPU, .* set `serving\.tensor_parallel: 2`"):
        plan_pool(folder, "bfloat16", choice, Serving(), FREE, 100)


TRAINED_ON = {
    "full_1b": "1xH100-80GB",
    "lora_1b": "1xH100-80GB",
    "full_8b_one_gpu": "1xH100-80GB",
    "lora_8b": "1xH100-80GB",
    "full_8b": "8xH100-80GB",
    "full_70b": "4x8xH100-80GB",
    "lora_70b": "4x8xH100-80GB",
    "flan_t5_xl": "8xH100-80GB",
    "flan_t5_xxl": "8xH100-80GB",
    "dpo_8b": "8xH100-80GB",
    "reward_8b": "8xH100-80GB",
    "grpo_8b": "8xH100-80GB",
}


@pytest.mark.parametrize(("name", "hardware"), TRAINED_ON.items())
def test_training_fits_the_hardware_that_it_is_made_for(name: str, hardware: str, tmp_path: Path) -> None:
    """Weights, sharding, activations and host memory of the model's real sizes, and the page says the same."""
    size = next(part for part in reversed(name.split("_")) if part in ("1b", "8b", "70b", "xl", "xxl"))
    base = big_t5(tmp_path, size) if "t5" in name else big_llama(tmp_path, size)
    recipe = load_recipe(find_recipe(f"large/{name}"), [f"model.base={base}"])
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, tmp_path)
    assert held_out
    assert len(tasks) > len(held_out)
    estimate = report_on_hardware(recipe, hardware).estimate
    assert estimate.fits
    assert estimate.hardware.total_gpus == recipe.training.max_workers + (recipe.training.grpo.actors if name == "grpo_8b" else 0)
    figures = f"{estimate.gpu.total / 1e9:.0f} GB | {estimate.host.total / 1e9:.0f} GB | {estimate.tokens_per_s:,.0f}"
    assert f"| `large/{name}` |" in PAGE
    assert figures in next(line for line in PAGE.splitlines() if f"| `large/{name}` |" in line), figures


@pytest.mark.parametrize(("tokens", "sharing"), [(131_072, 1), (131_072, 2), (131_072, 8), (262_144, 4)])
def test_the_figures_of_long_rows(tokens: int, sharing: int, tmp_path: Path) -> None:
    """Rows of one example each, one of a group at once; a length that does not fit has no speed."""
    changes = {"model.base": big_llama(tmp_path, "8b"), "data.packing.length": tokens, "data.max_length": tokens}
    changes |= {"training.sequence_parallel": sharing, "training.micro_batch": 1, "training.global_batch": 8}
    recipe = load_recipe(find_recipe("large/full_8b"), [f"{key}={value}" for key, value in changes.items()])
    estimate = report_on_hardware(recipe, "8xH100-80GB").estimate
    speed = f"yes | {round(estimate.tokens_per_s, -2):,.0f} |" if estimate.fits else "no | |"
    assert f"| {tokens:,} | {sharing} | {estimate.gpu.total / 1e9:.0f} GB | {speed}" in MEMORY_PAGE, speed


def test_the_page_has_the_recipes_and_the_figures() -> None:
    for file in (ROOT / "src" / "apprentice" / "recipes" / "large").glob("*.yaml"):
        assert f"| `large/{file.stem}` |" in PAGE, file
    figures: dict[str, Any] = {size: 2 * count / 1e9 for size, count in PARAMETERS.items()}
    assert f"{figures['8b']:.1f} GB of weights" in PAGE
    assert f"{figures['70b']:.0f} GB of weights" in PAGE
    assert f"{figures['70b'] / 8:.1f} GB" in PAGE
