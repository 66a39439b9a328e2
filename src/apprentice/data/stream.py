"""The stream of packed rows through Ray Data: it begins where a checkpoint says and is the same on any cluster.

    numbers of windows ─▶ actors that make whole windows ─▶ blocks of equally many rows ─▶ the training workers

The last step is what makes a resume exact: Ray Train deals blocks out in turn, so with `global_batch / max_workers` rows a
block every optimizer step is one contiguous stretch of rows, whatever the number of workers. Knows nothing of training.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from apprentice.data.corpus import Corpus, estimate_steps, make_corpus
from apprentice.data.packing import Rows
from apprentice.data.window import WindowRenderer
from apprentice.recipe import Recipe

if TYPE_CHECKING:
    import ray
    import ray.data

__all__ = ["Corpus", "Start", "estimate_steps", "make_corpus", "render_window", "train_stream", "validation_rows"]

MAX_BLOCKS = 256  # of window numbers, while windows are few: Ray takes 2 ms for each before the first window is rendered
WINDOWS_PER_BLOCK = 32  # at most: an actor works through a block, and what it is ahead of its turn waits in memory
WINDOWS_TOGETHER = 4  # travel as one object: each one costs Ray a twentieth of a core's second, a fifth of a window's own work
_TYPES = {
    "window": pa.int64(),
    "row": pa.int32(),
    "window_rows": pa.int32(),
    "examples": pa.list_(pa.int64()),
    "example_tasks": pa.list_(pa.int32()),
    "example_targets": pa.list_(pa.int32()),
    "example_weights": pa.list_(pa.float32()),
    "reference": pa.list_(pa.float32()),
    "advantages": pa.list_(pa.float32()),
    "rewards": pa.list_(pa.float32()),
    "dropped": pa.string(),
}
SPARE_WINDOWS = 64  # a stream has four times the windows that the run is estimated to need, and these


@dataclass(frozen=True)
class Start:
    """Where a stream begins: the first row that was not yet trained on."""

    window: int = 0
    row: int = 0


def render_window(corpus: Corpus | WindowRenderer, window: int) -> Rows:
    """The packed rows of one window (columns: see `apprentice.data.window`), in this process."""
    return (corpus if isinstance(corpus, WindowRenderer) else WindowRenderer(corpus)).window(window)


def validation_rows(corpus: Corpus, limit_rows: int) -> Rows:
    """At most `limit_rows` packed rows of validation examples, the same on every worker; no rows if there are no such examples."""
    return WindowRenderer(corpus).validation(limit_rows)


def train_stream(corpus: Corpus, start: Start = Start(), windows: int | None = None, concurrency: int = 1) -> ray.data.Dataset:
    """The rows from `start` on, in order, `global_batch / max_workers` of them in a block; one row is one packed row.

    `windows` bounds how many windows are read; by default so many that the stream outlasts the run. `concurrency` is the
    number of actors, one CPU each. Ray must be up.
    """
    import ray.data  # here, because it takes seconds, and windows are made without it too

    estimate = estimate_steps(corpus)
    if windows is None:
        needed = ceil(estimate["steps"] * corpus.recipe.training.global_batch / estimate["rows_per_window"])
        windows = 4 * max(1, needed - start.window) + SPARE_WINDOWS
    together = min(WINDOWS_TOGETHER, max(1, windows // concurrency))
    per_block = max(together, min(WINDOWS_PER_BLOCK, ceil(windows / MAX_BLOCKS)))
    numbers = ray.data.range(windows, concurrency=1, override_num_blocks=ceil(windows / per_block))
    # An actor hands on what it has when that is larger than this.
    numbers.context.target_max_block_size = ceil((together - 0.5) * estimate["rows_per_window"] * corpus.row_bytes)
    rows = numbers.map_batches(
        _WindowActor,
        fn_constructor_args=(ray.put(corpus), start),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=concurrency),
        num_cpus=1,
    )
    return in_steps(rows, corpus.recipe)


def in_steps(rows: ray.data.Dataset, recipe: Recipe) -> ray.data.Dataset:
    """`rows` in order, in blocks of as many as one of the most workers takes for a step."""
    from apprentice.data.backpressure import Pace

    rows.context.enable_progress_bars = False
    rows.context.execution_options.preserve_order = True
    rows.context.custom_execution_callback_classes = [Pace]
    unit = recipe.training.global_batch // recipe.training.max_workers
    stream: ray.data.Dataset = rows.repartition(target_num_rows_per_block=unit, strict=True)
    return stream


class _WindowActor:
    """One of the processes that make windows."""

    def __init__(self, corpus: ray.ObjectRef[Corpus], start: Start) -> None:
        import ray

        # One thread each: the actors share the cores among themselves. Read when the tokenizer first encodes a batch.
        os.environ["TOKENIZERS_PARALLELISM"] = "false"
        self._renderer = WindowRenderer(ray.get(corpus))
        self._start = start
        gc.freeze()  # modules and corpus stay: collections, of which a window causes many, need not look through them

    def __call__(self, batch: Mapping[str, Any]) -> pa.Table:
        window = self._start.window + int(batch["id"][0])
        rows = self._renderer.window(window)
        first = self._start.row if window == self._start.window else 0
        return table_of({name: column[first:] for name, column in rows.items()})


def table_of(rows: Rows) -> pa.Table:
    """As Arrow columns: tables as fixed-shape tensors, one array a row as lists; the types are the same for no rows at all."""
    return pa.table({name: _column(name, values) for name, values in rows.items()})


def _column(name: str, values: Any) -> pa.Array:
    if values.ndim == 1:
        return pa.array(list(values), _TYPES[name])
    storage = pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), values.shape[1])
    return pa.ExtensionArray.from_storage(pa.fixed_shape_tensor(storage.type.value_type, values.shape[1:]), storage)
