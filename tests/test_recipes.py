"""Every recipe that is shipped loads, names real tasks, says what it would download, and runs with a tiny model of its kind."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice import check, road
from apprentice.recipe import SHIPPED, Recipe, load_recipe
from apprentice.tasks.loading import select_tasks
from tests.conftest import ROOT
from tests.samples import tiny_model_of, write_datasets

RECIPES = sorted(SHIPPED.glob("*.yaml"))
SINGLE_SET = {"alpaca", "dolly"}
# What Mistral 7B Instruct v0.2's model card shows for two turns: [INST] … [/INST] answer</s>[INST] … [/INST]
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
# Recipe → the architecture of its base; those in FAR go all the way to an HTTP reply, the others to packed rows.
MODELS = {
    "alpaca": "llama",
    "dolly": "gpt_neox",
    "full": "llama",
    "lora": "llama",
    "mistral_instruct": "mistral",
    "quickstart": "llama",
    "flan_mini": "llama",
    "flan": "t5_v1.1",
    "flan_t5": "t5_v1.1",
    "prompt_tuning": "llama",
    "prefix_tuning": "llama",
    "adapter_tuning": "llama",
}
FAR = ("alpaca", "mistral_instruct", "prefix_tuning")
T5 = ("flan", "flan_t5")


def test_there_are_recipes():
    assert {file.stem for file in RECIPES} >= {
        "quickstart",
        "flan_mini",
        "alpaca",
        "dolly",
        "lora",
        "full",
        "mistral_instruct",
        "flan",
        "flan_t5",
        "t0",
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_loads_and_its_tasks_exist(file: Path):
    recipe = load_recipe(file)
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, file.parent)
    assert len(tasks) >= (2 if file.stem in SINGLE_SET else 8)
    assert 0 < len(held_out) < len(tasks)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=")
    for page in [word for word in text.replace("\n", " ").split() if word.startswith("docs/recipes/")]:
        assert (ROOT / page).is_file(), page


DOWNLOADS = {
    "alpaca": "model huggyllama/llama-7b (estimate 13.5 GB: 6.74 billion parameters of 2 bytes); 1 datasets from the hub"
    " (tatsu-lab/alpaca; sizes unknown)",
    "dolly": "model EleutherAI/pythia-6.9b (estimate 13.7 GB: 6.86 billion parameters of 2 bytes); 1 datasets from the hub"
    " (databricks/databricks-dolly-15k; sizes unknown)",
    "mistral_instruct": "model mistralai/Mistral-7B-Instruct-v0.2 (estimate 14.5 GB: 7.24 billion parameters of 2 bytes); ",
}


@pytest.mark.parametrize("name", DOWNLOADS)
def test_check_says_what_it_would_download_with_the_hub_out_of_reach(name, tmp_path):
    recipe = load_recipe(SHIPPED / f"{name}.yaml", [f"storage={tmp_path}"])
    assert check.POINTS["downloads"](recipe).startswith(DOWNLOADS[name])


def tiny(name: str, tokenizer: Path, folder: Path) -> Recipe:
    """The recipe `name` over sample rows with a tiny model of its architecture, a few steps on one CPU worker."""
    shipped = load_recipe(SHIPPED / f"{name}.yaml")
    tasks, _ = select_tasks(shipped.data.entries, shipped.data.hold_out, folder)
    write_datasets(tasks, folder / "data")
    model = tiny_model_of(MODELS[name], tokenizer, folder / "model", INST if name == "mistral_instruct" else None)
    changes = [
        f"storage={folder}/runs",
        f"data.root={folder}/data",
        f"model={{base: {model}, dtype: float32}}",
        "data.max_length=384",
        "data.packing.length=384",
        *(["data.packing.target_length=96"] if shipped.data.packing.target_length else []),
        "data.window=64",
        "training.workers=1",
        "training.resources={cpus: 1, gpus: 0}",
        "training.global_batch=2",
        "training.steps=2",
        "training.tokens=null",
        "training.epochs=null",
        "training.optimizer.warmup_steps=0",
        f"training.deepspeed.stage={0 if shipped.training.optimizer.name == 'adafactor' else 2}",
        "serving={port: 0, context: 512, max_running: 2}",
    ]
    return load_recipe(SHIPPED / f"{name}.yaml", changes)


@pytest.mark.parametrize("name", MODELS)
def test_recipe_makes_packed_rows_in_its_layout(name, tiny_model, tmp_path):
    from apprentice.artifacts import Run
    from apprentice.data.pipeline import make_corpus, render_window
    from apprentice.storage import Folder

    recipe = tiny(name, tiny_model, tmp_path)
    corpus = make_corpus(recipe, Run(Folder.at(tmp_path / "scratch")), parallel=False)
    rows = render_window(corpus, 0)
    assert len(rows["input_ids"]) >= 1
    assert rows["loss_mask"].sum() > 0
    if name in T5:
        assert rows["target_ids"].shape[1] == corpus.target_length
        return
    text = corpus.layout.tokenizer.decode(rows["input_ids"][0].tolist(), skip_special=False)
    shown = {"alpaca": "### Response:", "dolly": "### Response:", "mistral_instruct": "[/INST]"}
    assert shown.get(name, "<|im_start|>assistant") in text


@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAR)
def test_recipe_runs_to_an_answered_request(name, tiny_model, ray_cluster, tmp_path):
    recipe = tiny(name, tiny_model, tmp_path)
    result = road.train(recipe, progress=lambda stage, values: None)
    assert result["steps"] == 2
    with road.endpoint(result["run"], progress=lambda stage, values: None) as url:
        assert isinstance(road.ask(url, "Name a colour.", "", max_tokens=4), str)
