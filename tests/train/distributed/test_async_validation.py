"""Validation aside: where it is chosen, and what it says of a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from apprentice.errors import EvaluationError, ResourcesError
from apprentice.models.loading import load_model
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Recipe, load_recipe
from apprentice.storage import Folder
from apprentice.train.distributed import async_validation
from apprentice.train.distributed.async_validation import CheckpointValidator, validates_asynchronously
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.state import State
from tests.support.checkpoints import save
from tests.support.recipes import tiny_recipe
from tests.train.rows import packed_rows

ROOM, NO_ROOM = [{"CPU": 5.0}], [{"CPU": 4.0}]  # two workers, two for the data, one aside


def recipe(folder: Path, model: Path, **values: Any) -> Recipe:
    return load_recipe(tiny_recipe(folder, model, **values))


def test_aside_where_there_is_room(tmp_path: Path, tiny_model: Path) -> None:
    made = recipe(tmp_path, tiny_model)
    assert (validates_asynchronously(made, ROOM), validates_asynchronously(made, NO_ROOM)) == (True, False)
    split = recipe(tmp_path, tiny_model, training__deepspeed={"stage": 3})
    assert not validates_asynchronously(split, ROOM)
    within = recipe(tmp_path, tiny_model, training__checkpoint={"every_steps": 2, "validation": "workers"})
    assert not validates_asynchronously(within, ROOM)
    made_aside = recipe(tmp_path, tiny_model, training__checkpoint={"every_steps": 2, "validation": "aside"})
    assert validates_asynchronously(made_aside, ROOM)
    with pytest.raises(ResourcesError, match=r"^training\.checkpoint\.validation aside takes the CPUs and GPUs of one more worker"):
        validates_asynchronously(made_aside, NO_ROOM)
    scored = recipe(tmp_path, tiny_model, evaluation__while_training=2)
    with pytest.raises(ResourcesError, match=r"^evaluation\.while_training takes the CPUs"):
        validates_asynchronously(scored, NO_ROOM)
    with pytest.raises(ValidationError, match=r"scores checkpoints in a task aside, and this run has none"):
        Recipe.model_validate(within.model_dump() | {"evaluation": {"while_training": 2}})


@pytest.mark.parametrize(("memory", "has_autoscaler"), [(0.5, False), (0.5, True), (2.0, False)])
def test_the_workers_validate_where_no_node_has_memory_for_a_task_beside_them(
    memory: float, has_autoscaler: bool, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_validation, "has_autoscaler", lambda: has_autoscaler)
    messages: list[str] = []
    nodes = [{**node, "memory": memory * 2**30} for node in ROOM]
    is_aside = memory > 1 or has_autoscaler
    assert validates_asynchronously(recipe(tmp_path, tiny_model), nodes, messages.append) == is_aside
    expected = (
        "the workers validate checkpoints, and training waits meanwhile: a task beside them needs 1.0 GiB of memory on one node"
    )
    assert [message.partition(",")[0] for message in messages] == ([] if is_aside else [expected.partition(",")[0]])
    assert all("the largest has 0.5" in message for message in messages)
    demanded = recipe(tmp_path, tiny_model, training__checkpoint={"every_steps": 2, "validation": "aside"})
    assert validates_asynchronously(demanded, nodes)  # the task says what it lacks


@pytest.mark.parametrize("method", ["full", "lora", "adapter"])
def test_the_loss_is_that_of_the_weights_in_the_checkpoint(method: str, tmp_path: Path, tiny_model: Path) -> None:
    made = recipe(tmp_path, tiny_model, tuning={"method": method, "rank": 4, "width": 8})
    rows = packed_rows(4, first=900)
    model = TUNING_METHODS[method].wrap(load_model(tiny_model, torch.float32), made.tuning, made.seed).eval()
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(2)
        for parameter in trainable_parameters(model).values():
            parameter += 0.05 * torch.randn_like(parameter)
    tensors = [(f"weight/{name}", parameter.detach().clone()) for name, parameter in trainable_parameters(model).items()]
    saved = save(Folder.at(tmp_path / "saved"), tensors, State(step=2), {"dtype": "float32"})
    with torch.no_grad():
        summed = sum(float(SupervisedLoss(model)(micro)) for micro in rows.micro_batches(1))
    records: list[dict[str, Any]] = []
    prompt = torch.tensor([[5, 6, 7]])

    def score(scored: Any) -> dict[str, float]:
        with torch.no_grad():
            apart = (scored(input_ids=prompt).logits - model(input_ids=prompt).logits).abs().max()
        return {"a": float(apart), "b": 2.0}

    loss = CheckpointValidator(made, rows, rows.input_ids.shape[1], score)(saved, records.append, on_gpu=False)
    assert loss == pytest.approx(summed / rows.targets, rel=1e-5)
    assert records[0] == {"validation_loss": loss}
    assert records[1]["held_out_tasks"]["a"] == pytest.approx(0.0, abs=1e-4)
    assert records[1]["held_out"] == pytest.approx(1.0, abs=1e-4)


def test_tasks_that_cannot_be_scored_stop_nothing(tmp_path: Path, tiny_model: Path) -> None:
    made = recipe(tmp_path, tiny_model, tuning={"method": "full"})
    model = load_model(tiny_model, torch.float32)
    tensors = [(f"weight/{name}", value.detach()) for name, value in model.named_parameters()]
    saved = save(Folder.at(tmp_path / "saved"), tensors, State(step=2), {"dtype": "float32"})
    records: list[dict[str, Any]] = []

    def score(_: Any) -> dict[str, float]:
        raise EvaluationError("it writes nothing.")

    nothing = packed_rows(4, first=900).share(5, 6)
    assert CheckpointValidator(made, nothing, 256, score)(saved, records.append, on_gpu=False) is None
    assert records == [{"message": "the held-out tasks were not scored: it writes nothing."}]
