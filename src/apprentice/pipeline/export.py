"""A trained run's model as a folder to hand on: weights, tokenizer and prompt contract, with a model card."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from apprentice.data.encoding.prompt_contract import layout_beside
from apprentice.errors import ContractError, RunError, StorageError
from apprentice.pipeline.model_card import model_card
from apprentice.pretrained.architecture import family_of
from apprentice.run.contract import read_contract
from apprentice.run.folder import Run, find_run
from apprentice.tasks.registry import select_tasks


def export_run(target: str, folder: str, *, storage: str = "./runs") -> dict[str, Any]:
    """Writes the model of the run `target` into the new `folder`, which transformers loads by itself.

    Raises `RunError` if there is no such trained run, and `StorageError` if `folder` holds something or cannot be written.
    """
    run = find_run(target, storage)
    if run is None:
        raise RunError(f"{target!r} is not a run in {storage}; `apprentice runs` lists them.")
    if not run.is_trained:
        raise RunError(f"run {run.name!r} has no trained model yet; train it first.")
    place = Path(folder)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise StorageError(f"{folder} is there already and not empty; name a new folder.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=place.parent, ignore_cleanup_errors=True) as scratch:
            part = Path(scratch) / "model"
            if run.model.is_local:
                shutil.copytree(run.model.local, part)
            else:
                run.model.download(part)
            layout_beside(part)  # what was copied has the weights that the contract was written for
            card = _card(run, part)
            (part / "README.md").write_text(card, encoding="utf-8")
            size = sum(file.stat().st_size for file in part.rglob("*") if file.is_file())
            if place.exists():
                place.rmdir()
            os.replace(part, place)
    except OSError as error:
        raise StorageError(f"{folder} cannot be written ({error.strerror or error}); make room or name another folder.") from error
    return {"folder": str(place), "run": str(run.folder), "bytes": size}


def _card(run: Run, part: Path) -> str:
    contract = read_contract(part)
    if contract is None:
        raise ContractError(f"the model of run {run.name!r} has no prompt contract; train it again.")
    recipe = run.recipe()
    tasks, held_out = select_tasks(recipe.data.entries, recipe.data.hold_out, Path.cwd(), find=run.tasks().find)
    report = run.report / "report.json"
    kind = "text2text-generation" if family_of(part) == "seq2seq" else "text-generation"
    return model_card(
        recipe,
        contract,
        run.ledger_file.read_json() if run.ledger_file.exists() else {"examples": 0, "target_tokens": 0, "tasks": {}},
        run.export_file.read_json() if run.export_file.exists() else None,
        report.read_json() if report.exists() else None,
        tasks,
        held_out,
        kind,
    )
