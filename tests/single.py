"""A recipe from raw rows to an answered HTTP request in one plain process: the same worker, export and routes, without Ray.

Knows nothing of pytest.
"""

from __future__ import annotations

import asyncio
import json
import os
import warnings
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any


def answered(recipe: Any) -> dict[str, Any]:
    """Trains as `recipe` says, exports, and asks the endpoint's routes: the losses, the reply and what the run folder holds."""
    import httpx
    import torch

    from apprentice.artifacts import open_run
    from apprentice.data.contract import layout_beside
    from apprentice.data.pipeline import make_corpus, render_window, validation_rows
    from apprentice.models.loading import load_model
    from apprentice.serve.catalogue import Catalogue, Model
    from apprentice.serve.ingress import build_app
    from apprentice.serve.transformers_engine import TransformersEngine
    from apprentice.train import checkpoint as checkpoints
    from apprentice.train.batch import PackedRows
    from apprentice.train.export import export
    from apprentice.train.state import Goal
    from apprentice.train.worker import run_worker

    run = open_run(recipe)
    corpus = make_corpus(recipe, run, parallel=False)

    def rows(size: int) -> Iterator[PackedRows]:
        for window in count():
            columns = render_window(corpus, window)
            for start in range(0, len(columns["row"]) - size + 1, size):
                yield PackedRows.of({name: values[start : start + size] for name, values in columns.items()})

    told: list[dict[str, Any]] = []
    run_worker(
        recipe,
        run,
        Goal(recipe.training.steps),
        None,
        rows,
        PackedRows.of(validation_rows(corpus, 2)),
        corpus.row_length,
        device=torch.device("cpu"),
        tell=told.append,
        register=lambda saved, state: None,
    )
    best = checkpoints.best(run.checkpoints)
    assert best is not None
    export(recipe, run, best, corpus.layout)
    folder = run.model.local

    async def ask() -> dict[str, Any]:
        engine = TransformersEngine(folder, dtype="float32", max_running=2, max_queued=2, context=256, threads=1)
        app = build_app(Catalogue([Model(recipe.name, engine, layout_beside(folder))]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            asked = {"instruction": "Name a colour.", "input": "", "max_tokens": 4, "ignore_eos": True}
            reply = await http.post("/v1/instruct", json=asked)
        engine.close()
        return {"status": reply.status_code, **reply.json()}

    loaded = load_model(folder, torch.float32)
    return {
        "losses": [record["loss"] for record in told if "loss" in record],
        "message": next(record["message"] for record in told if "message" in record),
        "reply": asyncio.run(ask()),
        "kind": type(loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded).__name__,
    }


def process(_: int, folder: str, files: dict[str, list[Any]]) -> None:
    """For torch.multiprocessing: answers every recipe of `files` (name → file and overrides), into `folder`/<name>.json."""
    import torch
    import torch.distributed as dist

    from apprentice.recipe import load_recipe

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    for name, (file, changes) in files.items():
        found: dict[str, Any]
        try:
            found = answered(load_recipe(Path(file), changes))
        except Exception as error:  # so that one recipe does not hide the others
            found = {"error": f"{type(error).__name__}: {error}"}
        (Path(folder) / f"{name}.json").write_text(json.dumps(found))
    dist.destroy_process_group()
