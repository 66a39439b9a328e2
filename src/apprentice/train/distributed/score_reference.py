"""Reference log-probabilities of all preference pairs of a run, for DPO: computed once with Ray Data and kept in the run.

    chunks of rows ─▶ actors with the frozen model: packed as in training, forward only ─▶ <run>/reference/<task>.npz

A task whose file exists is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import ray
import ray.data
import torch

from apprentice.data.corpus import Corpus
from apprentice.data.reference import ReferenceLogProbs
from apprentice.data.window import WindowRenderer
from apprentice.model_pool.actors import reserve_memory
from apprentice.model_pool.device import reserved_device
from apprentice.model_pool.model import weight_bytes
from apprentice.models.attention import PackedCompute
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.tasks.schema import Task
from apprentice.train.batch import PackedRows, PreferenceBatch, move_batch
from apprentice.train.engine.deepspeed_config import CPU_MICRO_TOKENS, GPU_MICRO_TOKENS
from apprentice.train.losses.preference import answer_log_probabilities
from apprentice.train.losses.target_losses import TargetLosses

CHUNK_PAIRS = 256  # pairs for one call of an actor


class _Chunk(NamedTuple):
    """Rows of one task for one call of an actor."""

    task: int  # number in `Corpus.tasks`
    rows: tuple[int, ...]


def compute_references(recipe: Recipe, run: Run, corpus: Corpus, actors: int) -> dict[str, ReferenceLogProbs]:
    """Task name → log-probabilities of its training and validation pairs, read from `run`, or computed now and written there.

    Ray must be running; each of `actors` processes reserves the CPUs and GPUs of a training worker. The reference model is
    `reference` of the objective's block, or else the base model before tuning.
    """
    files = {task.name: run.reference / f"{task.name}.npz" for task in corpus.tasks if task.name in corpus.plan.shares}
    missing = [number for number, task in enumerate(corpus.tasks) if task.name in files and not files[task.name].exists()]
    chunks = [chunk for number in missing for chunk in _chunks(corpus, number)]
    if chunks:
        columns = _compute(recipe, corpus, chunks, actors)
        for number in missing:
            rows, values = columns["row"][columns["task"] == number], columns["values"][columns["task"] == number]
            order = np.argsort(rows)
            ReferenceLogProbs(rows[order], values[order]).write(files[corpus.tasks[number].name])
    return {name: ReferenceLogProbs.read(file) for name, file in files.items()}


def _chunks(corpus: Corpus, number: int) -> Iterator[_Chunk]:
    index = corpus.indices[corpus.tasks[number].name]
    rows = np.sort(np.concatenate([index.train, index.validation]))
    for start in range(0, len(rows), CHUNK_PAIRS):
        yield _Chunk(number, tuple(rows[start : start + CHUNK_PAIRS].tolist()))


def _compute(recipe: Recipe, corpus: Corpus, chunks: list[_Chunk], actors: int) -> dict[str, Any]:
    """The columns task, row and values, with one entry for each pair; values is float32 (pairs, 2), the better answer first."""
    resources = recipe.training.resources
    base = local_folder(recipe.training.reference or recipe.model.base)
    weights = weight_bytes(base, recipe.model.dtype, gpu=resources.gpus > 0)
    numbers = ray.data.range(len(chunks), override_num_blocks=len(chunks))
    numbers.context.enable_progress_bars = False
    computed = numbers.map_batches(
        _ReferenceActor,
        fn_constructor_args=(recipe, ray.put(corpus), ray.put(chunks)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(chunks))),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        memory=reserve_memory(weights, "an actor of the reference model", cpus=resources.cpus, gpus=resources.gpus),
    )
    batches = list(computed.iter_batches(batch_size=None, batch_format="numpy"))
    columns = {name: np.concatenate([batch[name] for batch in batches]) for name in ("task", "row", "better", "worse")}
    return columns | {"values": np.stack([columns["better"], columns["worse"]], axis=1)}


class _ReferenceActor:
    """An actor with the frozen reference model."""

    def __init__(self, recipe: Recipe, corpus: Any, chunks: Any) -> None:
        self._corpus: Corpus = ray.get(corpus)
        self._chunks: list[_Chunk] = ray.get(chunks)
        self._renderer = WindowRenderer(self._corpus)
        on_gpu = recipe.training.resources.gpus > 0
        self._device = torch.device(reserved_device(recipe.training.resources.gpus))
        if not on_gpu:
            torch.set_num_threads(max(1, int(recipe.training.resources.cpus)))
        self._at_once = max(1, (GPU_MICRO_TOKENS if on_gpu else CPU_MICRO_TOKENS) // self._corpus.row_length)
        four_bit = recipe.training.reference is None and TUNING_METHODS[recipe.tuning.method].four_bit
        base = recipe.training.reference or recipe.model.base
        dtype = resolve_dtype(recipe.model.dtype, self._device.type)
        settings: dict[str, Any] = {"four_bit": four_bit, "trust": recipe.model.trust}
        packed = PackedCompute.on(self._device, dtype)
        model: Any = load_model(base, dtype, recipe.model.attention, **settings, packed=packed)
        self._targets = TargetLosses(model.to(self._device).eval())

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        chunk = self._chunks[int(batch["id"][0])]
        rows, values = self._pairs(self._corpus.tasks[chunk.task], chunk.rows)
        return {"task": np.full(len(rows), chunk.task), "row": rows, "better": values[:, 0], "worse": values[:, 1]}

    def _pairs(self, task: Task, rows: tuple[int, ...]) -> tuple[Any, Any]:
        """Row numbers (pairs,) int64 and log-probabilities (pairs, 2) float32, of those `rows` that fit into a packed row."""
        # Labelled answers and the other rows' answers beside them are pairs here.
        packed = replace(PackedRows.from_columns(self._renderer.zero_shot(task, rows)), desirable=None)
        parts = [np.zeros(0, np.float32)]
        with torch.no_grad():
            for batch in packed.micro_batches(self._at_once):
                assert isinstance(batch, PreferenceBatch)
                parts.append(answer_log_probabilities(self._targets, move_batch(batch, self._device)).float().cpu().numpy())
        numbers = [row for fact in packed.facts for row in fact.examples]
        return np.array(numbers, np.int64), np.concatenate(parts).reshape(-1, 2)
