"""The recipe: what is accepted, what is refused, and with which sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from apprentice.cli import app
from apprentice.errors import RecipeError
from apprentice.recipe import SHIPPED, Recipe, data_parallel_size, dump_recipe, find_recipe, load_recipe

SMALL = """\
name: small
model: {base: smollm2-135m-instruct}
data:
  tasks: [sst2, ./mine.yaml]
  packing: {length: 1024}
training:
  workers: 2
  steps: 10
  global_batch: 4
"""


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str) -> Path:
        file = tmp_path / "recipe.yaml"
        file.write_text(text, encoding="utf-8")
        return file

    return _write


def test_paths_are_relative_to_the_recipe(write, tmp_path):
    recipe = load_recipe(write(SMALL + "storage: ./runs\nserving: {beside: [./other, org/model]}\n"))
    assert recipe.serving.beside == (str(tmp_path / "other"), "org/model")
    assert recipe.storage == str(tmp_path / "runs")
    assert recipe.data.tasks == ("sst2", str(tmp_path / "mine.yaml"))
    assert recipe.model.base == "smollm2-135m-instruct"


def test_paths_typed_on_the_command_line_are_relative_to_where_it_was_typed(write, tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    typed = [
        "storage=./out",
        "data.root=sets",
        "model.base=./weights",
        "data.tasks=[sst2, ./mine.yaml]",
        "evaluation.judge=../judge",
        "serving={adapters: adapters, beside: [../other, run-of-mine]}",
    ]
    recipe = load_recipe(write(SMALL), typed)
    assert (recipe.storage, recipe.data.root, recipe.model.base) == (str(here / "out"), str(here / "sets"), str(here / "weights"))
    assert recipe.data.tasks == ("sst2", str(here / "mine.yaml"))
    assert recipe.evaluation.judge == str(tmp_path / "judge")
    assert (recipe.serving.adapters, recipe.serving.beside) == (str(here / "adapters"), (str(tmp_path / "other"), "run-of-mine"))


@pytest.mark.parametrize(
    ("typed", "key", "path"),
    [
        ("{alpaca: ./rows.jsonl, test: more/test.jsonl}", "alpaca", "rows.jsonl"),
        ("{alpaca: ./rows.jsonl, test: more/test.jsonl}", "test", "more/test.jsonl"),
        ("{natural_instructions: 'tasks/*.json', official_splits: splits}", "official_splits", "splits"),
        ("{preferences: pairs.jsonl}", "preferences", "pairs.jsonl"),
        ("{promptsource: ./glue/templates.yaml}", "promptsource", "glue/templates.yaml"),
    ],
)
def test_so_are_those_of_a_collection(write, tmp_path, monkeypatch, typed, key, path):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    for override in (f"data.tasks=[sst2, {typed}]", f"data={{tasks: [sst2, {typed}]}}"):
        named = load_recipe(write(SMALL), [override]).data.tasks[1]
        assert getattr(named, key) == str(here / path)


def test_a_collections_name_stays_a_name_on_the_command_line(write):
    typed = "data.tasks=[{promptsource: glue/mrpc}, {preferences: org/pairs, splits: {train: train_prefs}}, {alpaca: s3://b/rows}]"
    names = load_recipe(write(SMALL), [typed]).data.tasks
    assert [names[0].promptsource, names[1].preferences, names[2].alpaca] == ["glue/mrpc", "org/pairs", "s3://b/rows"]


def test_runs_lie_in_the_current_directory_unless_the_recipe_says_where(write, tmp_path, monkeypatch):
    here = tmp_path / "elsewhere"
    here.mkdir()
    monkeypatch.chdir(here)
    assert load_recipe(write(SMALL)).storage == str(here / "runs")
    shipped = [load_recipe(file).storage for file in sorted(SHIPPED.glob("*.yaml"))]
    assert len(shipped) >= 21
    assert set(shipped) == {str(here / "runs")}


def test_a_shipped_recipe_keeps_its_runs_where_the_command_line_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(find_recipe("alpaca"), ["storage=runs"]).storage == str(tmp_path / "runs")


def test_addresses_and_names_on_the_command_line_stay_as_they_are(write):
    recipe = load_recipe(write(SMALL), ["storage=s3://bucket/runs", "model.base=org/model"])
    assert (recipe.storage, recipe.model.base) == ("s3://bucket/runs", "org/model")


def test_overrides_reach_any_depth(write):
    recipe = load_recipe(write(SMALL), ["training.optimizer.learning_rate=2e-4", "data.packing.length=2048", "name=other"])
    assert recipe.training.optimizer.learning_rate == 2e-4
    assert recipe.data.packing.length == 2048
    assert recipe.name == "other"


def test_a_dumped_recipe_loads_to_the_same(write, tmp_path):
    recipe = load_recipe(write(SMALL))
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        ("  steps: 10", "  step: 10", 8, "Did you mean 'steps'?"),
        ("  steps: 10", "  steps: 10\n  tokens: 5", 6, "exactly one of `steps`, `tokens` and `epochs`"),
        ("  global_batch: 4", "  global_batch: 5", 6, "global_batch 5 cannot be divided among 2 workers"),
        ("  global_batch: 4", "  global_batch: 4\n  micro_batch: 4", 6, "micro_batch 4 does not divide the 2 rows"),
        ("  steps: 10", "  steps: 10\n  optimizer: {warmup_steps: 10}", 6, "warmup_steps 10 is not shorter"),
        ("  steps: 10", "  steps: 10\n  router_loss: 0.1\n  sequence_parallel: 2", 6, "`router_loss` is taken over whole rows"),
        ("  steps: 10", "  steps: 10\n  router_loss: 0.1\n  objective: reward", 6, "`router_loss` belongs to `objective: sft`"),
        (
            "  steps: 10",
            "  steps: 10\n  optimizer: {name: adafactor, states: 8bit}\n  deepspeed: {stage: 0}",
            6,
            "optimizer.states 8bit is AdamW's, and the optimizer is adafactor",
        ),
        (
            "  steps: 10",
            "  steps: 10\n  optimizer: {states: 8bit}\n  deepspeed: {stage: 3, offload: nvme, nvme_path: /fast}",
            6,
            "offload nvme moves float32 states, and optimizer.states is 8bit",
        ),
        (
            "  steps: 10",
            "  steps: 10\n  compile: true\n  deepspeed: {stage: 3}",
            6,
            "compile cannot be combined with deepspeed.stage 3",
        ),
        (
            "  steps: 10",
            "  steps: 10\n  compile: true\n  sequence_parallel: 2",
            6,
            "compile cannot be combined with sequence_parallel 2",
        ),
        (
            "  steps: 10",
            "  steps: 10\n  compile: true\n  activation_checkpointing: offload",
            6,
            "compile cannot be combined with activation_checkpointing offload",
        ),
        ("  steps: 10", "  steps: 10\n  kernels: liger", 6, "kernels liger needs a GPU, and resources.gpus is 0; use auto"),
        (
            "  steps: 10",
            "  steps: 10\n  kernels: liger\n  compile: true\n  resources: {gpus: 1}",
            6,
            "compile makes kernels of its own of what kernels liger replaces",
        ),
        (
            "training:",
            "tuning: {method: prefix}\ntraining:\n  compile: true",
            1,
            "tuning.method prefix puts virtual tokens before a row, which training.compile has no code for",
        ),
        ("training:", "tuning: {method: full, rslora: true}\ntraining:", 6, "tuning.rslora is a kind of LoRA"),
        ("training:", "tuning: {dora: true, experts: true}\ntraining:", 6, "tuning.dora measures the weights of linear layers"),
        (
            "training:",
            "tuning: {dora: true}\ntraining:\n  deepspeed: {stage: 3}",
            1,
            "tuning.dora takes lengths of whole weights, which training.deepspeed.stage 3 splits up",
        ),
        (
            "training:",
            "tuning: {method: full}\ntraining:\n  optimizer: {loraplus_ratio: 16}",
            1,
            "training.optimizer.loraplus_ratio is of LoRA's matrices, and tuning.method is full",
        ),
        (
            "  steps: 10",
            "  steps: 10\n  deepspeed: {stage: 0}\n  optimizer: {name: adafactor, loraplus_ratio: 16}",
            6,
            "optimizer.loraplus_ratio is AdamW's",
        ),
        ("  workers: 2", "  workers: {min: 4, max: 2}", 7, "min 4 is more than max 2"),
        ("{length: 1024}", "{length: 512}", 3, "max_length 1024 is more than packing.length 512"),
        ("  packing", "  formats: {zero_shot: 0.5}\n  packing", 5, "add up to 0.5, not to 1"),
        ("  packing", "  mixture: {groups: {flan: {shar: 1, tasks: [nli]}}}\n  packing", 5, "Did you mean 'share'?"),
        ("  steps: 10", "  steps: 10\n  objective: dpo", 1, "packing.length 1024 must be at least twice max_length 1024"),
        ("  steps: 10", "  steps: 10\n  objective: orpo", 1, "packing.length 1024 must be at least twice max_length 1024"),
        ("  steps: 10", "  steps: 10\n  simpo: {beta: 0.2}", 6, "the block `simpo` belongs to `objective: simpo`"),
        ("  steps: 10", "  steps: 10\n  dpo: {beta: 0.2}", 6, "the block `dpo` belongs to `objective: dpo`"),
        ("name: small", "name: a/b", 1, "name:"),
        ("model: {base: smollm2-135m-instruct}\n", "", 1, "model: this key is needed"),
        ("  tasks: [sst2, ./mine.yaml]", "  tasks: []", 4, "data.tasks:"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_with_its_line(write, old, new, line, words):
    assert old in SMALL
    file = write(SMALL.replace(old, new))
    with pytest.raises(RecipeError) as caught:
        load_recipe(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:{line}: ")
    assert words in message
    assert "\n" not in message


@pytest.mark.parametrize(("text", "words"), [("- a\n", "mapping of keys"), ("a: [\n", "not YAML"), ("", "mapping of keys")])
def test_a_file_that_is_no_recipe(write, text, words):
    with pytest.raises(RecipeError, match=words):
        load_recipe(write(text))


def test_a_dumped_collection_loads_to_the_same(write, tmp_path):
    recipe = load_recipe(write(SMALL.replace("[sst2, ./mine.yaml]", "[sst2, {preferences: ./pairs.jsonl, cluster: taste}]")))
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_a_missing_recipe_names_what_is_shipped(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")
    with pytest.raises(RecipeError, match="Did you mean 'quickstart'"):
        find_recipe("quickstrat")


def test_an_override_without_a_value_is_refused(write):
    with pytest.raises(RecipeError, match=r"write key\.path=value"):
        load_recipe(write(SMALL), ["training.steps"])


def test_schema_describes_every_top_level_key():
    printed = CliRunner().invoke(app, ["recipe-schema"])
    schema = json.loads(printed.stdout)
    assert set(schema["properties"]) == set(Recipe.model_fields)
    assert schema["additionalProperties"] is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=many", "override 'training.steps=many': training.steps: a whole number is needed (it is 'many')."),
        ("evaluation.shots=3", "override 'evaluation.shots=3': evaluation.shots: a list is needed, as in [a, b] (it is 3)."),
        ("training.stps=3", "override 'training.stps=3': training.stps: not a key of a recipe. Did you mean 'steps'?"),
        ("training={steps: 3, global_batch: x}", "override 'training={steps: 3, global_batch: x}': training.global_batch: a whole"),
        ("model=small", "override 'model=small': model: a block of keys is needed (it is 'small')."),
        ("model.trust=perhaps", "override 'model.trust=perhaps': model.trust: true or false is needed (it is 'perhaps')."),
        ("training.steps=0", "override 'training.steps=0': training.steps: it must be greater than or equal to 1 (it is 0)."),
        ("name=[a]", "override 'name=[a]': name: a text is needed; put it in quotes (it is ['a'])."),
    ],
)
def test_the_fault_of_an_override_is_told_of_the_override(write, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write(SMALL), ["seed=1", override])
    assert message in str(error.value)


def test_a_fault_of_the_file_is_told_of_its_line_whatever_is_overridden(write) -> None:
    file = write(SMALL.replace("steps:", "stps:"))
    with pytest.raises(RecipeError, match=rf"^{file}:\d+: training\.stps: not a key of a recipe"):
        load_recipe(file, ["training.workers=2"])


@pytest.mark.parametrize(("workers", "sharing", "groups"), [(8, 1, 8), (8, 4, 2), (2, 2, 1)])
def test_workers_that_share_rows_count_once(workers: int, sharing: int, groups: int) -> None:
    assert data_parallel_size(workers, sharing) == groups


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        ("  sequence_parallel: 4", "2 workers cannot share rows in groups of 4"),
        ("  sequence_parallel: 2\n  objective: dpo", "sequence_parallel is for objective sft, and dpo needs whole rows"),
        ("  sequence_parallel: 2\n  checkpoint: {validation: aside}", "validation aside gives whole rows to one worker"),
        ("  sequence_parallel: 2\ntuning: {method: prompt}", "puts virtual tokens before a row"),
        ("  sequence_parallel: 2\nevaluation: {while_training: 2}", "while_training gives whole rows to one worker"),
    ],
)
def test_rows_that_cannot_be_shared_are_refused(write, more: str, sentence: str) -> None:
    with pytest.raises(RecipeError, match=sentence):
        load_recipe(write(f"{SMALL}{more}\n"))


def test_rows_that_workers_share_need_a_batch_for_each_group(write) -> None:
    shared = SMALL.replace("workers: 2", "workers: 8") + "  sequence_parallel: 2\n"
    assert load_recipe(write(shared)).training.max_readers == 4
    with pytest.raises(RecipeError, match="global_batch 2 cannot be divided among 4 groups of 2 workers that share rows"):
        load_recipe(write(shared.replace("global_batch: 4", "global_batch: 2")))
    with pytest.raises(RecipeError, match=r"has an attention of its own, and model\.attention is sdpa"):
        load_recipe(write(shared), ["model.attention=sdpa"])


def test_workers_that_make_no_whole_groups_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"6 workers cannot share rows in groups of 4 .* choose a multiple of 4"):
        data_parallel_size(6, 4)


def test_a_mixture_of_groups_is_restored_from_its_dump(tmp_path: Path) -> None:
    (tmp_path / "groups.yaml").write_text(
        "name: a\nmodel: {base: m}\ntraining: {steps: 1}\n"
        "data: {tasks: [quickstart], mixture: {groups: {one: {share: 1, tasks: [topic]}, two: {share: 2, tasks: [nli]}}}}\n"
    )
    recipe = load_recipe(tmp_path / "groups.yaml")
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "again.yaml") == recipe
    with pytest.raises(RecipeError, match="each group has its own `strategy`"):
        load_recipe(tmp_path / "again.yaml", ["data.mixture.cap=7"])
