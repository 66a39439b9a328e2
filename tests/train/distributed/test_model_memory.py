"""Memory that training's own tasks and actors with a model reserve: validation aside, the reference, and writers of replies."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from apprentice.data.stream import Start
from apprentice.errors import ResourcesError
from apprentice.model_pool import actors, engine_choice
from apprentice.model_pool.host_memory import GIB
from apprentice.models.loading import count_parameters
from apprentice.recipe import Recipe, load_recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.distributed import score_reference, validation_task
from apprentice.train.distributed.resources import check_resources, required_resources
from apprentice.train.distributed.validation_task import ValidationTask
from apprentice.train.on_policy import rollout_stream
from apprentice.train.on_policy.rollout import weight_bytes_of_writer
from apprentice.train.on_policy.writer_engine import describe_writers
from tests.support.on_policy import round_recipe
from tests.support.recipes import tiny_recipe


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Recipe:
    return load_recipe(tiny_recipe(tmp_path, tiny_model))


def set_node_memory(monkeypatch: pytest.MonkeyPatch, amount: float) -> None:
    monkeypatch.setattr(actors, "node_resources", lambda: [{"CPU": 4.0, "memory": amount}])
    monkeypatch.setattr(actors, "has_autoscaler", lambda: False)


def test_a_validation_aside(recipe: Recipe, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation_task, "ray", SimpleNamespace(put=lambda value: value))
    set_node_memory(monkeypatch, 4.0 * GIB)
    validator: Any = SimpleNamespace(recipe=recipe)
    run = Run(Folder.at(tmp_path / "run"))
    task = ValidationTask(validator, run, recipe.training.resources)
    assert task.config(None).ray_remote_kwargs["memory"] == 4 * count_parameters(tiny_model) + GIB
    set_node_memory(monkeypatch, 0.5 * GIB)
    with pytest.raises(ResourcesError, match=r"^the validation of a checkpoint needs 1\.0 GiB of memory on one node"):
        ValidationTask(validator, run, recipe.training.resources)


class RecordingDataset:
    """Stands for a Ray dataset; keeps the options of `map_batches`."""

    def __init__(self) -> None:
        self.options: dict[str, Any] = {}
        self.context = SimpleNamespace()

    def map_batches(self, _: type, **options: Any) -> RecordingDataset:
        self.options = options
        return self

    def iter_batches(self, **_: Any) -> list[pa.Table]:
        return [pa.table({"task": [0], "row": [0], "values": [[0.0, 0.0]]})]


@pytest.fixture
def dataset(monkeypatch: pytest.MonkeyPatch) -> RecordingDataset:
    made = RecordingDataset()
    data = SimpleNamespace(range=lambda *_, **__: made, ActorPoolStrategy=lambda size: size)
    for module in (score_reference, rollout_stream):
        monkeypatch.setattr(module, "ray", SimpleNamespace(data=data, put=lambda value: value))
    set_node_memory(monkeypatch, 8.0 * GIB)
    return made


def test_the_reference(recipe: Recipe, tiny_model: Path, dataset: RecordingDataset) -> None:
    chunks, actor = [score_reference._Chunk(0, (1,))], score_reference._ReferenceActor
    score_reference._compute(recipe, None, chunks, 2, actor)  # type: ignore[arg-type]
    assert dataset.options["memory"] == 4 * count_parameters(tiny_model) + GIB


@pytest.mark.parametrize(("beta", "models"), [(0.1, 3), (0.0, 2)])
def test_a_writer_of_replies_holds_the_policy_the_reward_model_and_the_reference(
    beta: float, models: int, recipe: Recipe, tiny_model: Path
) -> None:
    grpo = recipe.training.grpo.model_copy(update={"reward": str(tiny_model), "beta": beta})
    made = recipe.model_copy(update={"training": recipe.training.model_copy(update={"grpo": grpo})})
    assert weight_bytes_of_writer(made) == models * 4 * count_parameters(tiny_model)


@pytest.mark.parametrize(("is_installed", "gpus"), [(True, 4), (False, 1)])
def test_a_writer_reserves_the_gpus_that_vllm_splits_the_policy_over(
    is_installed: bool, gpus: int, tmp_path: Path, tiny_model: Path, dataset: RecordingDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"serving__tensor_parallel": 4, "training__resources": {"gpus": 1}, "training__grpo__reward": str(tiny_model)}
    made = load_recipe(round_recipe(tmp_path, tiny_model, **changes))
    monkeypatch.setattr(engine_choice.importlib.util, "find_spec", lambda _: is_installed or None)
    monkeypatch.setattr(engine_choice, "_check_heads", lambda *_: None)  # the tiny model has two
    monkeypatch.setattr(actors, "node_resources", lambda: [{"CPU": 64.0, "GPU": 8.0, "memory": 64.0 * GIB}])
    monkeypatch.setattr(rollout_stream, "repartition_by_step", lambda rows, _: rows)
    rollout_stream.stream_rounds(SimpleNamespace(recipe=made), None, Start(0, 0))  # type: ignore[arg-type]
    assert dataset.options["num_gpus"] == gpus
    engine = dataset.options["fn_constructor_args"][-1]
    assert (engine.choice.name, engine.tensor_parallel) == (("vllm", 4) if is_installed else ("transformers", 1))
    assert ("package vllm, which is not installed" in describe_writers(made, engine)) is not is_installed
    request = required_resources(made)
    assert request.data_gpus == gpus
    assert request.bundles()[2:3] == [{"CPU": 1.0, "GPU": float(gpus)}]
    if is_installed:
        with pytest.raises(ResourcesError, match=r"writes replies asks for 4 GPUs of one node .*, and the largest node has 3"):
            check_resources(request, [{"CPU": 8.0, "GPU": 3.0}] * 3)
