"""Stream of rows of an on-policy run: rounds made by Ray Data actors, each with the weights at the end of the round before.

With `grpo.staleness` 1 the weights are one round older, so a round is written while the one before it is trained on.

    number of a round ─▶ actors that wait for its weights, then write, score and pack replies ─▶ <run>/rounds/ ─▶ the workers

Rounds are kept in the run's folder: one that is there is read, not made again. Training workers just take rows; the snapshot of the
weights that they write after a round's last step lets the actors begin the next round.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray
import ray.data
import torch

from apprentice.data.corpus import Corpus
from apprentice.data.stream import Start, arrow_table, repartition_by_step
from apprentice.errors import TrainingError
from apprentice.model_pool.actors import reserve_memory
from apprentice.model_pool.device import reserved_device
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.shard_reader import open_tensors
from apprentice.train.on_policy.rollout import RoundWriter, weight_bytes_of_writer
from apprentice.train.on_policy.writer_engine import WriterEngine, choose_writer_engine

WAIT_S = 0.2  # between two checks for new weights


def stream_rounds(corpus: Corpus, run: Run, start: Start) -> ray.data.Dataset:
    """The rows of all rounds from `start` on, in order and in blocks as `train_stream` gives them. Ray must be running.

    Readers must not prefetch beyond the current step: a round's rows wait for weights that only training makes.
    """
    recipe = corpus.recipe
    steps, shape = recipe.training.steps or 0, recipe.round
    items = max(1, -(-steps // shape.steps) - start.window) * shape.parts
    numbers = ray.data.range(items, concurrency=1, override_num_blocks=items)  # a block each: handed on once made
    resources, engine = recipe.training.resources, choose_writer_engine(recipe)
    rows = numbers.map_batches(
        _RoundActor,
        fn_constructor_args=(ray.put(corpus), run, start, engine),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=shape.parts),
        num_cpus=resources.cpus,
        num_gpus=engine.gpus or None,  # of one node, as Ray gives them
        memory=reserve_memory(
            weight_bytes_of_writer(recipe), "an actor that writes replies", cpus=resources.cpus, gpus=engine.gpus
        ),
    )
    return repartition_by_step(rows, recipe)


class _RoundActor:
    """An actor that makes one part of a round for each call, or reads it if it was made before."""

    def __init__(self, corpus: ray.ObjectRef[Corpus], run: Run, start: Start, engine: WriterEngine) -> None:
        self._corpus = ray.get(corpus)
        self._run, self._start = run, start
        resources = self._corpus.recipe.training.resources
        if not resources.gpus:
            torch.set_num_threads(max(1, int(resources.cpus)))
        self._writer = RoundWriter(self._corpus, torch.device(reserved_device(resources.gpus)), engine)

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        shape = self._corpus.recipe.round
        number, part = divmod(int(batch["id"][0]), shape.parts)
        window = self._start.window + number
        file = self._run.rounds / f"{window:06d}-{part}.parquet"
        if not file.exists():
            _write(file, self._made(window, part))
        rows = pq.read_table(io.BytesIO(file.read_bytes()))
        trained_on = self._start.row - rows["row"][0].as_py() if window == self._start.window else 0
        return rows.slice(min(max(0, trained_on), len(rows)))

    def _made(self, window: int, part: int) -> pa.Table:
        recipe = self._corpus.recipe
        step = max(0, window - recipe.training.grpo.staleness) * recipe.round.steps
        if step == 0:
            return arrow_table(self._writer.rows(window, part, None))
        with open_tensors(wait_for_weights(self._run, step)) as reader:
            return arrow_table(self._writer.rows(window, part, reader.read))


def wait_for_weights(run: Run, step: int) -> Checkpoint:
    """Waits for the weights after `step` and returns them. If the workers are gone, Ray ends this process with the stream.

    Raises `TrainingError` if there are newer ones, or a newer checkpoint, and not these: they will never come.
    """
    while True:
        passed = any(checkpoints.find_newest_step(run.checkpoints, kind) > step for kind in (checkpoints.STEP, checkpoints.WEIGHTS))
        if (weights := checkpoints.find_weights(run.checkpoints, step)) is not None:
            return weights
        if passed:
            raise TrainingError(
                f"the replies of the round after step {step} are not all written, and the weights of that step, which were"
                f" writing them, are damaged or gone; start run {run.name!r} over with --restart."
            )
        time.sleep(WAIT_S)


def _write(file: Folder, rows: pa.Table) -> None:
    stream = io.BytesIO()
    pq.write_table(rows, stream)
    file.create(stream.getvalue())  # the first writer of a round wins
