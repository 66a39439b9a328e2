"""Log-probabilities by a frozen model of all rows of a run: a reference's of answers, for preferences, a teacher's of tokens, for
distillation; computed once with Ray Data and kept in the run.

    chunks of rows ─▶ actors with the frozen model: packed as in training, forward only ─▶ <run>/reference/<task>.npz

A task whose file exists is not computed again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray
import ray.data
import torch

from apprentice.data.corpus import Corpus
from apprentice.data.reference import ReferenceLogProbs, TeacherLogProbs
from apprentice.data.window import WindowRenderer
from apprentice.model_pool.actors import reserve_memory
from apprentice.model_pool.device import reserved_device
from apprentice.model_pool.model import weight_bytes
from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import load_model, resolve_dtype
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.pretrained.architecture import vocabulary_size
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.batch import PackedRows, PreferenceBatch, SupervisedBatch, move_batch
from apprentice.train.engine.deepspeed_config import CPU_MICRO_TOKENS, GPU_MICRO_TOKENS
from apprentice.train.losses.distill import likeliest_tokens, target_logits
from apprentice.train.losses.preference import answer_log_probabilities
from apprentice.train.losses.target_losses import TargetLosses

CHUNK_ROWS = 256  # rows for one call of an actor


class _Chunk(NamedTuple):
    """Rows of one task for one call of an actor."""

    task: int  # number in `Corpus.tasks`
    rows: tuple[int, ...]


def compute_references(recipe: Recipe, run: Run, corpus: Corpus, actors: int) -> dict[str, ReferenceLogProbs]:
    """Task name → log-probabilities of its training and validation pairs, read from `run`, or computed now and written there.

    Ray must be running; each of `actors` processes reserves the CPUs and GPUs of a training worker. The reference model is
    `reference` of the objective's block, or else the base model before tuning.
    """
    for file, table in _compute_missing(recipe, run, corpus, actors, _ReferenceActor):
        values = np.array(table["values"].to_pylist(), np.float32)
        ReferenceLogProbs(table["row"].to_numpy(), values.reshape(-1, 2)).write(file)  # none where no pair fits into a row
    return {name: ReferenceLogProbs.read(file) for name, file in _files(run, corpus).items()}


def compute_teacher(recipe: Recipe, run: Run, corpus: Corpus, actors: int) -> dict[str, TeacherLogProbs]:
    """Task name → the teacher's likeliest tokens at the targets of its training and validation rows; else as above."""
    for file, table in _compute_missing(recipe, run, corpus, actors, _TeacherActor):
        _teacher_of(table).write(file)
    return {name: TeacherLogProbs.read(file) for name, file in _files(run, corpus).items()}


def _teacher_of(table: pa.Table) -> TeacherLogProbs:
    """The teacher's tokens at the targets of one task's rows, of which none may have fitted into a packed row."""
    ends = np.cumsum(table["targets"].to_numpy())
    targets = int(ends[-1]) if len(ends) else 0
    flat = (table[name].combine_chunks().flatten().to_numpy() for name in ("ids", "values"))
    ids, values = (numbers.reshape(targets, len(numbers) // max(targets, 1)) for numbers in flat)
    return TeacherLogProbs(table["row"].to_numpy(), ends, ids.astype(np.int32), values.astype(np.float32))


def _files(run: Run, corpus: Corpus) -> dict[str, Folder]:
    """Task → the file of its values, of the tasks that are trained on."""
    return {task.name: run.reference / f"{task.name}.npz" for task in corpus.tasks if task.name in corpus.plan.shares}


def _compute_missing(
    recipe: Recipe, run: Run, corpus: Corpus, actors: int, actor: type[_FrozenActor]
) -> Iterator[tuple[Folder, pa.Table]]:
    """The file that each task without one is to have, and what `actor` says of its rows, in order of their numbers."""
    files = _files(run, corpus)
    missing = [number for number, task in enumerate(corpus.tasks) if task.name in files and not files[task.name].exists()]
    chunks = [chunk for number in missing for chunk in _chunks(corpus, number)]
    if not chunks:
        return
    table = _compute(recipe, corpus, chunks, actors, actor)
    for number in missing:
        yield files[corpus.tasks[number].name], table.filter(pc.field("task") == number).sort_by("row")


def _chunks(corpus: Corpus, number: int) -> Iterator[_Chunk]:
    index = corpus.indices[corpus.tasks[number].name]
    rows = np.sort(np.concatenate([index.train, index.validation]))
    for start in range(0, len(rows), CHUNK_ROWS):
        yield _Chunk(number, tuple(rows[start : start + CHUNK_ROWS].tolist()))


def _compute(recipe: Recipe, corpus: Corpus, chunks: list[_Chunk], actors: int, actor: type[_FrozenActor]) -> pa.Table:
    """The columns that `actor` makes of all chunks."""
    resources = recipe.training.resources
    base = local_folder(recipe.training.reference or recipe.model.base)
    weights = weight_bytes(base, recipe.model.dtype, gpu=resources.gpus > 0)
    numbers = ray.data.range(len(chunks), override_num_blocks=len(chunks))
    numbers.context.enable_progress_bars = False
    computed = numbers.map_batches(
        actor,
        fn_constructor_args=(recipe, ray.put(corpus), ray.put(chunks)),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(chunks))),
        num_cpus=resources.cpus,
        num_gpus=resources.gpus or None,
        memory=reserve_memory(weights, "an actor of the reference model", cpus=resources.cpus, gpus=resources.gpus),
    )
    return pa.concat_tables(computed.iter_batches(batch_size=None, batch_format="pyarrow"))


class _FrozenActor:
    """An actor with a frozen model."""

    def __init__(self, recipe: Recipe, corpus: Any, chunks: Any) -> None:
        self._corpus: Corpus = ray.get(corpus)
        self._chunks: list[_Chunk] = ray.get(chunks)
        self._renderer = WindowRenderer(self._corpus)
        self._distill = recipe.training.distill
        self._vocabulary = vocabulary_size(local_folder(recipe.model.base))
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

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        """One line for each row of the chunk that fits into a packed row."""
        chunk = self._chunks[int(batch["id"][0])]
        # Labelled answers and the other rows' answers beside them are pairs here.
        packed = replace(
            PackedRows.from_columns(self._renderer.zero_shot(self._corpus.tasks[chunk.task], chunk.rows)), desirable=None
        )
        with torch.no_grad():
            columns = self._read(packed)
        rows = np.array([row for fact in packed.facts for row in fact.examples], np.int64)
        return pa.table({"task": np.full(len(rows), chunk.task), "row": rows, **columns})

    def _read(self, packed: PackedRows) -> dict[str, Any]:
        """The columns for the examples of `packed`, in order."""
        raise NotImplementedError


class _ReferenceActor(_FrozenActor):
    """An actor with the reference: log-probabilities of both answers of each pair, the better one first."""

    def _read(self, packed: PackedRows) -> dict[str, Any]:
        parts = [np.zeros(0, np.float32)]
        for batch in packed.micro_batches(self._at_once):
            assert isinstance(batch, PreferenceBatch)
            parts.append(answer_log_probabilities(self._targets, move_batch(batch, self._device)).float().cpu().numpy())
        return {"values": pa.array(list(np.concatenate(parts).reshape(-1, 2)), pa.list_(pa.float32()))}


class _TeacherActor(_FrozenActor):
    """An actor with the teacher: its likeliest tokens at each target."""

    def _read(self, packed: PackedRows) -> dict[str, Any]:
        ids, values = [], []
        for batch in packed.micro_batches(1):  # the logits of all targets of a row are there at once
            assert isinstance(batch, SupervisedBatch)
            logits = target_logits(self._targets, move_batch(batch, self._device))[:, : self._vocabulary]
            tokens = likeliest_tokens(logits, self._distill.top, self._distill.temperature)
            ids.append(tokens.ids.int().cpu().numpy())
            values.append(tokens.log_probs.cpu().numpy())
        counts = [count for fact in packed.facts for count in fact.targets]
        by_row = {"ids": (ids, pa.int32()), "values": (values, pa.float32())}
        columns = {
            name: pa.array([part.ravel() for part in np.split(np.concatenate(parts), np.cumsum(counts)[:-1])], pa.list_(kind))
            for name, (parts, kind) in by_row.items()
        }
        return {
            "targets": np.array(counts, np.int64),
            **(columns if counts else {name: pa.array([], pa.list_(kind)) for name, (_, kind) in by_row.items()}),
        }
