"""The stream of packed rows as a Ray Dataset: it starts where a checkpoint says, and its order is the same on any cluster.

    window numbers ─▶ actors that render whole windows ─▶ blocks of equally many rows ─▶ training workers

Blocks of equal size make a resume exact. Ray Train deals blocks out in turn, so with `global_batch / max_workers` rows a
block every optimizer step is one contiguous range of rows, whatever the number of workers. With `global_batch` 4 and
`max_workers` 4, a block is one row:

    rows        0 1 2 3 │ 4 5 6 7 │ …      steps
    2 workers   A B A B │ A B A B │ …
    4 workers   A B C D │ A B C D │ …

With several lanes (recipe/lanes.py) there are as many streams, each of every L-th window and for its part of the workers.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from apprentice.data.corpus import Corpus, make_corpus
from apprentice.data.example_reader import DropCounts
from apprentice.data.packing import Rows
from apprentice.data.run_length import estimate_steps
from apprentice.data.window import WindowRenderer
from apprentice.recipe import Recipe

if TYPE_CHECKING:
    import ray
    import ray.data

__all__ = ["Corpus", "Start", "estimate_steps", "make_corpus", "render_window", "train_stream", "validation_rows"]

MAX_BLOCKS = 256  # of window numbers, while windows are few: Ray takes 2 ms for each before the first window is rendered
WINDOWS_PER_BLOCK = 32  # at most: an actor works through a block, and windows finished before their turn wait in memory
WINDOWS_PER_OBJECT = 4  # in one object: each object costs Ray a twentieth of a core's second, a fifth of a window's own work
_TYPES = {
    "window": pa.int64(),
    "row": pa.int32(),
    "window_rows": pa.int32(),
    "examples": pa.list_(pa.int64()),
    "example_tasks": pa.list_(pa.int32()),
    "example_targets": pa.list_(pa.int32()),
    "example_weights": pa.list_(pa.float32()),
    "reference": pa.list_(pa.float32()),
    "desirable": pa.list_(pa.uint8()),
    "teacher_ids": pa.list_(pa.int32()),
    "teacher_log_probs": pa.list_(pa.float32()),
    "advantages": pa.list_(pa.float32()),
    "rewards": pa.list_(pa.float32()),
    "dropped": pa.string(),
}
SPARE_WINDOWS = 64  # added to four times the windows that the run is estimated to need


@dataclass(frozen=True)
class Start:
    """The start of a lane's stream: window and row of the lane's first packed row that was not yet trained on."""

    window: int = 0
    row: int = 0


def render_window(corpus: Corpus | WindowRenderer, window: int) -> Rows:
    """The packed rows of one window (columns: see `apprentice.data.row_columns`), in this process."""
    return (corpus if isinstance(corpus, WindowRenderer) else WindowRenderer(corpus)).window(window)


def empty_window_drops(corpus: Corpus, window: int) -> DropCounts | None:
    """Drop counts (task → reason → examples) of a window without rows, which the stream passes over; None for one with rows."""
    return WindowRenderer(corpus).empty_window_drops(window)


def validation_rows(corpus: Corpus, limit_rows: int) -> Rows:
    """At most `limit_rows` packed rows of validation examples, the same on every worker; no rows if there are no examples."""
    return WindowRenderer(corpus).validation(limit_rows)


def train_stream(
    corpus: Corpus,
    start: Start = Start(),
    windows: int | None = None,
    concurrency: int = 1,
    shared: ray.ObjectRef[Corpus] | None = None,
) -> ray.data.Dataset:
    """The packed rows of the lane of window `start.window` from `start` on, in order, in blocks of `Lanes.block_rows` rows.

    `windows` is the number of windows to read; the default is enough to outlast the run. `concurrency` is the number of
    rendering actors, one CPU each. `shared` is `corpus` in Ray's object store, if it lies there already. Ray must be initialised.
    Columns: see `apprentice.data.row_columns`.
    """
    import ray.data  # here, because the import takes seconds, and windows can be rendered without it

    estimate, lanes = estimate_steps(corpus), corpus.recipe.lanes
    if windows is None:
        needed = ceil(estimate["steps"] * lanes.rows / estimate["rows_per_window"])
        windows = 4 * max(1, needed - start.window // lanes.count) + SPARE_WINDOWS
    windows_per_object = min(WINDOWS_PER_OBJECT, max(1, windows // concurrency))
    windows_per_block = max(windows_per_object, min(WINDOWS_PER_BLOCK, ceil(windows / MAX_BLOCKS)))
    numbers = ray.data.range(windows, concurrency=1, override_num_blocks=ceil(windows / windows_per_block))
    # Bytes of buffered output at which an actor emits a block: `windows_per_object` windows, less half of one.
    numbers.context.target_max_block_size = ceil((windows_per_object - 0.5) * estimate["rows_per_window"] * corpus.row_bytes)
    rows = numbers.map_batches(
        _WindowActor,
        fn_constructor_args=(shared or ray.put(corpus), start),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=1,
    )
    return repartition_by_step(rows, corpus.recipe)


def repartition_by_step(rows: ray.data.Dataset, recipe: Recipe) -> ray.data.Dataset:
    """`rows` in order, repartitioned into blocks of `Lanes.block_rows` rows."""
    from apprentice.data.backpressure import BackpressurePause

    rows.context.enable_progress_bars = False
    rows.context.execution_options.preserve_order = True
    rows.context.custom_execution_callback_classes = [BackpressurePause]
    stream: ray.data.Dataset = rows.repartition(target_num_rows_per_block=recipe.lanes.block_rows, strict=True)
    return stream


class _WindowActor:
    """Ray actor that renders windows, one a call."""

    def __init__(self, corpus: ray.ObjectRef[Corpus], start: Start) -> None:
        import ray

        # One tokenizer thread an actor, since the actors share the cores. Read when the tokenizer first encodes a batch.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._renderer = WindowRenderer(ray.get(corpus))
        self._lanes = self._renderer.corpus.recipe.data.lanes
        self._start = start
        gc.freeze()  # modules and corpus stay: the many collections that a window causes need not traverse them

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        window = self._start.window + self._lanes * int(batch["id"][0])
        rows = self._renderer.window(window)
        first = self._start.row if window == self._start.window else 0
        return arrow_table({name: column[first:] for name, column in rows.items()})


def arrow_table(rows: Rows) -> pa.Table:
    """`rows` as an Arrow table: 2-D arrays become fixed-shape tensors, ragged ones lists; types are the same for zero rows."""
    return pa.table({name: _column(name, values) for name, values in rows.items()})


def _column(name: str, values: Any) -> pa.Array:
    if values.ndim == 1:
        return pa.array(list(values), _TYPES[name])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(storage.type.value_type, values.shape[1:]), storage)
