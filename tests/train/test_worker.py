"""What a worker makes of running out of memory, without the engine."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from apprentice.errors import TrainingError
from apprentice.recipe import load_recipe
from apprentice.run.folder import open_run
from apprentice.train import worker
from apprentice.train.state import Goal
from tests.support.recipes import tiny_recipe
from tests.train.rows import packed_rows


@pytest.mark.parametrize("where", ["build_engine", "train_loop"])
def test_out_of_memory_is_one_sentence(where: str, tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__workers=1, tuning={"method": "full"}))
    engine = SimpleNamespace(trained=(1000, 0.5), micro=4, attention="sdpa", state=lambda: iter(()))

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(worker, "build_engine", lambda *_, **__: engine)
    monkeypatch.setattr(worker, where, full)
    told: list[dict[str, Any]] = []
    with pytest.raises(
        TrainingError, match=r"^a worker ran out of memory with 4 rows of 256 tokens at once \(the process"
    ) as caught:
        worker.run_worker(
            recipe,
            open_run(recipe),
            Goal(2),
            None,
            iter([packed_rows(4)]),
            packed_rows(1),
            256,
            device=torch.device("cpu"),
            tell=told.append,
            register=lambda saved, state: None,
        )
    assert "training.micro_batch: 2 (the same steps, more passes), or training.activation_checkpointing: true" in str(caught.value)
    assert len(told) == (where == "train_loop")


def test_other_errors_stay_what_they_are(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*_: Any, **__: Any) -> Any:
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    recipe = load_recipe(tiny_recipe(tmp_path, tiny_model, training__workers=1))
    monkeypatch.setattr(worker, "build_engine", wrong)
    silent: dict[str, Any] = {"tell": lambda record: None, "register": lambda saved, state: None}
    rows = (iter([packed_rows(4)]), packed_rows(1), 256)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        worker.run_worker(recipe, open_run(recipe), Goal(2), None, *rows, device=torch.device("cpu"), **silent)
