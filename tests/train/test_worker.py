"""What a worker makes of running out of memory, without the engine."""

from __future__ import annotations

import pickle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.errors import TrainingError
from apprentice.recipe import load_recipe
from apprentice.run.folder import open_run
from apprentice.train import worker
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.distributed.failure import find_apprentice_error
from apprentice.train.state import Goal, State
from apprentice.train.worker_config import MicroBatchTooLargeError, WorkerConfig
from tests.support.recipes import tiny_recipe
from tests.train.rows import packed_rows


class Events:
    """Keeps the records; nothing else is told or asked."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def record(self, figures: dict[str, Any]) -> None:
        self.records.append(figures)

    def register_checkpoint(self, checkpoint: Checkpoint | None, state: State) -> None: ...

    def is_checkpoint_requested(self) -> bool:
        return False

    def empty_window_drops(self, window: int) -> None:
        return None


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_optimizer_steps_on_the_cores_of_the_worker(
    device: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside a GPU too, where it may be offloaded to the host. Engine and optimizer run in the thread that builds them."""
    resources = {"cpus": 3, "gpus": 1 if device == "cuda" else 0}
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__workers=1, training__resources=resources))
    threads = []

    class BuiltError(Exception):
        pass

    def build(*_: Any, **__: Any) -> Any:
        threads.append(torch.get_num_threads())
        raise BuiltError

    monkeypatch.setattr(worker, "build_engine", build)
    before = torch.get_num_threads()
    try:
        config = WorkerConfig(recipe, open_run(recipe), Goal(2), 256)
        with pytest.raises(BuiltError):
            worker.run_worker(config, None, iter([]), packed_rows(1), Events(), device=torch.device(device))
    finally:
        torch.set_num_threads(before)
    assert threads == [3]


@pytest.mark.parametrize("where", ["build_engine", "train_loop"])
def test_out_of_memory_is_one_sentence(where: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = {"training__workers": 1, "training__micro_batch": 4}
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, **fixed, tuning={"method": "full"}))
    engine = SimpleNamespace(trained=(1000, 0.5), micro=4, attention="sdpa", has_liger=False, state=lambda: iter(()))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(worker, "build_engine", lambda *_, **__: engine)
    monkeypatch.setattr(worker, where, full)
    events = Events()
    config = WorkerConfig(recipe, open_run(recipe), Goal(2), 256)
    with pytest.raises(
        TrainingError, match=r"^a worker ran out of memory with 4 rows of 256 tokens at once \(the process"
    ) as caught:
        worker.run_worker(config, None, iter([packed_rows(4)]), packed_rows(1), events, device=torch.device("cpu"))
    assert "training.micro_batch: 2 (the same steps, more passes), or training.activation_checkpointing: true" in str(caught.value)
    assert len(events.records) == (where == "train_loop")


@pytest.mark.parametrize(("limit", "micro"), [(None, 4), (2, 2), (3, 2), (1, 1)])
def test_out_of_memory_in_a_step_asks_for_fewer_rows_at_once(
    limit: int | None, micro: int, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While `micro_batch: auto` can take fewer; the limit may not divide a worker's four rows."""
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__workers=1, tuning={"method": "full"}))

    def build(*_: Any, micro: int, **__: Any) -> Any:
        return SimpleNamespace(trained=(1000, 0.5), micro=micro, attention="sdpa", has_liger=False, state=lambda: iter(()))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(worker, "build_engine", build)
    monkeypatch.setattr(worker, "train_loop", full)
    config = WorkerConfig(recipe, open_run(recipe), Goal(2), 256, largest_micro_batch=limit)
    with pytest.raises(TrainingError if micro == 1 else MicroBatchTooLargeError) as caught:
        worker.run_worker(config, None, iter([packed_rows(4)]), packed_rows(1), Events(), device=torch.device("cpu"))
    if micro > 1:
        brought = pickle.loads(pickle.dumps(caught.value))  # as Ray brings it to the driver
        assert caught.value.micro == brought.micro == micro
        said = find_apprentice_error(brought)  # if no attempt is left
        assert isinstance(said, TrainingError)
        assert "The smallest changes that help" in str(said)


@pytest.mark.parametrize(
    ("keys", "calls"),
    [
        ({}, ["load", "kernels auto", "trial", "engine"]),
        ({"training__kernels": "none"}, ["load", "kernels none", "trial", "engine"]),
        ({"training__deepspeed": {"stage": 3}}, ["split", "kernels auto", "estimate", "engine"]),
        ({"training__compile": True}, ["load", "kernels none", "trial", "compile", "engine"]),
    ],
)
def test_when_layers_are_given_kernels_and_compiled(
    keys: dict[str, Any], calls: list[str], tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels on models that were split as they were loaded, too; trial passes see layers before these are compiled."""
    order: list[str] = []

    def note(name: str, call: str, result: Any) -> None:
        monkeypatch.setattr(worker, name, lambda *_, **__: (order.append(call), result)[1])

    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__workers=1, **keys))
    is_split = recipe.training.deepspeed.stage == 3
    monkeypatch.setattr(worker, "create_splitter", lambda *_, **__: object() if is_split else None)
    note("restore_model", "split" if is_split else "load", "model")
    monkeypatch.setattr(worker, "use_kernels", lambda _, word, device: order.append(f"kernels {word}"))
    note("compile_layers", "compile", 2)
    note("find_micro_batch", "trial", 2)
    note("estimate_micro_batch", "estimate", 2)
    monkeypatch.setattr(worker, "total_memory", lambda _: 1e9)
    note("DeepSpeedEngine", "engine", None)
    settings: dict[str, Any] = {"dtype": torch.float32, "micro": 1, "device": torch.device("cpu"), "trial_length": 256}
    worker.build_engine(recipe, None, **settings, collectives=SimpleNamespace(workers=1))
    assert order == calls


def test_other_errors_stay_what_they_are(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__workers=1))
    monkeypatch.setattr(worker, "build_engine", wrong)
    config = WorkerConfig(recipe, open_run(recipe), Goal(2), 256)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        worker.run_worker(config, None, iter([packed_rows(4)]), packed_rows(1), Events(), device=torch.device("cpu"))
