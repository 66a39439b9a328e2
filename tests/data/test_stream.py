"""The stream through Ray Data: it begins exactly at a position, in one order, whoever reads it, and is all of the windows' rows."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any

import numpy as np
import pytest

from apprentice.data import stream as pipeline
from apprentice.data.corpus import Corpus
from apprentice.data.packing import Rows
from apprentice.data.stream import Start, render_window, train_stream, validation_rows
from apprentice.data.window import WindowRenderer
from tests.data.small import CorpusOf

Key = tuple[int, int, tuple[int, ...], bytes]


def keys(rows: Rows) -> list[Key]:
    """What identifies each row: window, row, plan positions and ids."""
    columns = zip(rows["window"], rows["row"], rows["examples"], rows["input_ids"], strict=True)
    return [(int(window), int(row), tuple(map(int, examples)), ids.tobytes()) for window, row, examples, ids in columns]


def expected(corpus: Corpus, windows: range, skip: int = 0) -> list[Key]:
    renderer = WindowRenderer(corpus)
    return [key for window in windows for key in keys(renderer.window(window))][skip:]


def read(stream: Any, batches: int | None = None) -> list[Key]:
    return [key for batch in islice(stream.iter_batches(batch_size=4, batch_format="numpy"), batches) for key in keys(batch)]


@pytest.mark.parametrize("start", [Start(), Start(2, 3), Start(1, 10_000)])
def test_it_begins_where_it_is_told(ray_cluster: None, corpus: Corpus, start: Start) -> None:
    rows = [len(render_window(corpus, window)["row"]) for window in range(start.window + 1)]
    assert min(rows) > 3
    stream = train_stream(corpus, start, windows=4, concurrency=2)
    assert read(stream) == expected(corpus, range(start.window, start.window + 4), min(start.row, rows[start.window]))


def test_columns_arrive_as_they_left(ray_cluster: None, corpus: Corpus) -> None:
    sent = render_window(corpus, 0)
    [batch] = train_stream(corpus, windows=1).iter_batches(batch_size=len(sent["row"]), batch_format="numpy")
    assert batch.keys() == sent.keys()
    for name, column in sent.items():
        assert batch[name].dtype == column.dtype, name
        assert [np.asarray(value).tolist() for value in batch[name]] == [np.asarray(value).tolist() for value in column], name


def test_a_lane_is_every_other_window(ray_cluster: None, corpus_of: CorpusOf) -> None:
    """Lane 1 of two, taken up in the middle of window 3; its blocks hold what a worker reads of it in a step."""
    lane = corpus_of({"workers": 2, "steps": 5, "global_batch": 8}, lanes=2)
    stream = train_stream(lane, Start(3, 2), windows=2)
    assert read(stream) == expected(lane, range(3, 4), 2) + expected(lane, range(5, 6))
    assert lane.recipe.lanes.block_rows == 4


@pytest.fixture(scope="module")
def for_four(corpus_of: CorpusOf) -> Corpus:
    """Blocks of 2 rows, steps of 8."""
    return corpus_of({"workers": 4, "steps": 5, "global_batch": 8})


@pytest.mark.parametrize("consumers", [1, 2, 4])
def test_any_number_of_consumers_gets_the_same_steps(ray_cluster: None, for_four: Corpus, consumers: int) -> None:
    """As Ray Train reads it, blocks dealt out in turn: every step is one contiguous stretch, whoever resumes."""
    rows = expected(for_four, range(5))
    resumed = rows[8:]
    assert resumed[0][:2] == (0, 8)
    shards = train_stream(for_four, Start(0, 8), windows=5).streaming_split(consumers, equal=True)
    with ThreadPoolExecutor(consumers) as pool:
        parts = list(pool.map(lambda shard: list(shard.iter_batches(batch_size=8 // consumers, batch_format="numpy")), shards))
    steps = [sorted(key for batch in batches for key in keys(batch)) for batches in zip(*parts, strict=False)]
    whole = len(resumed) // 8 - 1  # the end of a finite stream may be dealt out unevenly
    assert whole >= 3
    assert steps[:whole] == [resumed[start : start + 8] for start in range(0, 8 * whole, 8)]


def test_many_windows_in_a_block_keep_their_order(ray_cluster: None, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "MAX_BLOCKS", 2)
    assert read(train_stream(corpus, windows=5, concurrency=2)) == expected(corpus, range(5))


def test_windows_without_rows_are_passed_over(ray_cluster: None, corpus_of: CorpusOf) -> None:
    corpus = corpus_of({"steps": 5, "global_batch": 1}, window=1, max_length=60)
    rows = expected(corpus, range(40))
    assert 20 < len(rows) < 40
    assert read(train_stream(corpus, windows=40)) == rows


def test_the_stream_outlasts_the_run(ray_cluster: None, corpus_of: CorpusOf) -> None:
    corpus = corpus_of({"steps": 30, "global_batch": 4})
    last = read(train_stream(corpus, Start(2, 1)), 30)[-1]
    assert last == expected(corpus, range(2, last[0] + 1), 1)[119]


def test_validation_rows_are_the_same_everywhere(corpus: Corpus) -> None:
    assert keys(validation_rows(corpus, 4)) == keys(validation_rows(corpus, 4)) == keys(WindowRenderer(corpus).validation(4))
