"""A recipe from raw rows to an answered HTTP request in one plain process: the same worker, export and routes, without Ray.

Knows nothing of pytest.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from tests.support.process_group import join_group
from tests.support.teachers import count_targets


class KilledError(Exception):
    """What ends a run in its middle."""


def answered(recipe: Any) -> dict[str, Any]:
    """Trains as `recipe` says, exports, and asks the endpoint's routes: the losses, the reply and what the run folder holds."""
    import httpx
    import torch

    from apprentice.data.encoding.prompt_contract import layout_beside
    from apprentice.data.stream import make_corpus
    from apprentice.data.window import WindowRenderer
    from apprentice.models.loading import load_model
    from apprentice.run.folder import open_run
    from apprentice.serve.api.application import build_app
    from apprentice.serve.engines.transformers import TransformersEngine
    from apprentice.serve.generation.served_models import Catalogue, ServedModel
    from apprentice.train.checkpoint import format as checkpoints
    from apprentice.train.checkpoint.model_export import export_model

    run = open_run(recipe)
    corpus = make_corpus(recipe, run, parallel=False)
    records: list[dict[str, Any]] = []
    trained(recipe, run, corpus, records)
    best = checkpoints.find_best(run.checkpoints)
    assert best is not None
    export_model(recipe, run, best, corpus.layout, WindowRenderer(corpus).probe(1))
    folder = run.model.local

    async def ask() -> dict[str, Any]:
        engine = TransformersEngine(folder, dtype="float32", max_running=2, max_queued=2, context=256, threads=1)
        app = build_app(Catalogue([ServedModel(recipe.name, engine, layout_beside(folder))]))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as http:
            body = {"instruction": "Name a colour.", "input": "", "max_tokens": 4, "ignore_eos": True}
            reply = await http.post("/v1/instruct", json=body)
        engine.close()
        return {"status": reply.status_code, **reply.json()}

    head = recipe.head
    loaded = load_model(folder, torch.float32, head=head)
    return {
        "losses": [record["loss"] for record in records if "loss" in record],
        "message": next(record["message"] for record in records if "message" in record),
        "reply": asyncio.run(ask()) if head is None else None,
        "kind": type(loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded).__name__,
    }


def trained(recipe: Any, run: Any, corpus: Any, records: list[dict[str, Any]], *, until: int | None = None) -> None:
    """Trains from the last checkpoint, if there is one; each record goes to `records`. Raises `KilledError` after step `until`."""
    import numpy as np
    import torch

    from apprentice.data.stream import render_window, validation_rows
    from apprentice.train.batch import PackedRows
    from apprentice.train.checkpoint import format as checkpoints
    from apprentice.train.checkpoint.shard_reader import open_tensors
    from apprentice.train.distributed.driver import count_validation_rows
    from apprentice.train.metrics.samples import SampleReplies
    from apprentice.train.on_policy.rollout import RoundWriter
    from apprentice.train.state import Goal, State
    from apprentice.train.worker import run_worker
    from apprentice.train.worker_config import WorkerConfig

    checkpoint = checkpoints.find_newest(run.checkpoints)
    begin = checkpoint.state if checkpoint is not None else State()
    [place] = begin.lanes

    def made(window: int) -> Any:
        if not recipe.training.aim.rounds:
            return render_window(corpus, window)
        if (lying := round_of(run, window)) is not None:
            return lying
        writer = RoundWriter(corpus, torch.device("cpu"))
        if window == 0:
            return writer.rows(0, 0, None)
        before = checkpoints.find_weights(run.checkpoints, window * recipe.round.steps)
        assert before is not None
        with open_tensors(before) as reader:
            return writer.rows(window, 0, reader.read)

    def rows(size: int) -> Iterator[PackedRows]:
        step, left = begin.step, None
        for window in count(place.window):
            first = place.row if window == place.window else 0
            columns = {name: values[first:] for name, values in made(window).items()}
            left = columns if left is None else {name: np.concatenate([left[name], columns[name]]) for name in columns}
            while len(left["row"]) >= size:
                if step == until:
                    raise KilledError
                step += 1
                yield PackedRows.from_columns({name: values[:size] for name, values in left.items()})
                left = {name: values[size:] for name, values in left.items()}

    class Events:
        """Records of the run; checkpoints are registered nowhere."""

        def record(self, figures: dict[str, Any]) -> None:
            records.append(figures)

        def register_checkpoint(self, checkpoint: Any, state: State) -> None:
            pass

        def is_checkpoint_requested(self) -> bool:
            return False

        def empty_window_drops(self, window: int) -> None:
            return None

    samples = SampleReplies(corpus.layout, recipe.training.sample_instructions)
    config = WorkerConfig(recipe, run, Goal(recipe.training.steps), corpus.row_length, samples=samples)
    validation = PackedRows.from_columns(validation_rows(corpus, min(2, count_validation_rows(recipe))))
    run_worker(config, checkpoint, rows(recipe.training.global_batch), validation, Events(), device=torch.device("cpu"))


def round_of(run: Any, window: int) -> dict[str, Any] | None:
    """The rows of the round over the prompts of `window`, as they lie in `run`; None where they do not."""
    import io

    import pyarrow as pa
    import pyarrow.parquet as pq

    file = run.rounds / f"{window:06d}-0.parquet"
    if not file.exists():
        return None
    table = pq.read_table(io.BytesIO(file.read_bytes()))

    def array(column: Any) -> Any:
        whole = column.combine_chunks()
        return whole.to_numpy_ndarray() if isinstance(whole.type, pa.FixedShapeTensorType) else column.to_pylist()

    return {name: array(table[name]) for name in table.column_names}


def gone_on(recipe: Any) -> dict[str, Any]:
    """Trains as `recipe` says twice, the second time killed after step 3 and begun again: the records of both, and what differs.

    The second time the model is also asked for replies, where it can write. The numbers of a reference or a teacher, where the
    objective needs one, are made up.
    """
    import numpy as np
    import torch

    from apprentice.data.reference import ReferenceLogProbs, TeacherLogProbs
    from apprentice.data.stream import make_corpus
    from apprentice.run.folder import Run, open_run
    from apprentice.train.checkpoint import format as checkpoints
    from apprentice.train.checkpoint.shard_reader import open_tensors

    def made(run: Run) -> Any:
        corpus = make_corpus(recipe, run, parallel=False)
        if recipe.training.objective == "distill":
            return replace(corpus, teacher={corpus.tasks[0].name: teacher_of(corpus)})
        [index] = corpus.indices.values()
        known = np.sort(np.concatenate([index.train, index.validation]))
        values = np.random.default_rng(5).normal(-20, 2, (len(known), 2)).astype(np.float32)
        return (
            replace(corpus, reference={index.task: ReferenceLogProbs(known, values)}) if recipe.training.aim.reference else corpus
        )

    def teacher_of(corpus: Any) -> TeacherLogProbs:
        rows, counts = count_targets(corpus)
        top, size = recipe.training.distill.top, sum(counts)
        draws = np.random.default_rng(6)
        ids = np.stack([draws.permutation(400)[:top] for _ in range(size)]).astype(np.int32)
        values = np.log(draws.dirichlet(np.ones(top + 1), size)).astype(np.float32)
        return TeacherLogProbs(rows, np.cumsum(counts), ids, values)

    def end(run: Run) -> dict[str, Any]:
        checkpoint = checkpoints.find_newest(run.checkpoints)
        assert checkpoint is not None
        with open_tensors(checkpoint) as reader:
            return {key: reader.read(key) for key in reader.shapes}

    records: dict[str, list[dict[str, Any]]] = {"whole": [], "before": [], "after": []}
    run = open_run(recipe)
    trained(recipe, run, made(run), records["whole"])
    other = Run(run.folder / "other")
    if recipe.training.objective != "reward":
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"sample_every_steps": 2})})
    try:
        trained(recipe, other, made(other), records["before"], until=3)
    except KilledError:
        torch.rand(100)  # whatever happened in between
        trained(recipe, other, made(other), records["after"])
    first, second = end(run), end(other)
    differ = [name for name in first.keys() | second.keys() if not torch.equal(first[name], second[name])]
    return {**records, "tensors": len(first), "differ": differ}


def process(_: int, folder: str, files: dict[str, list[Any]], what: Callable[[Any], dict[str, Any]] = answered) -> None:
    """For torch.multiprocessing: `what` of every recipe of `files` (name → file, overrides), into `folder`/<name>.json."""
    import torch.distributed

    from apprentice.recipe import load_recipe

    join_group(folder)
    for name, (file, changes) in files.items():
        result: dict[str, Any]
        try:
            result = what(load_recipe(Path(file), changes))
        except Exception as error:  # so that one recipe does not hide the others
            result = {"error": f"{type(error).__name__}: {error}"}
        (Path(folder) / f"{name}.json").write_text(json.dumps(result))
    torch.distributed.destroy_process_group()
