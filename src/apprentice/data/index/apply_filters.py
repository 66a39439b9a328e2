"""Application of the row filters to whole tasks: reads rows in chunks, lets `row_filters` choose, and reports contamination.

    chunks of test rows ──passages_of──▶ hashes of all test passages
    chunks of training rows ──measure_rows──▶ numbers a row ──choose_rows──▶ rows kept, one task at a time

The caller passes a `RunCalls` function, which executes the calls for the chunks in this process or on Ray.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from apprentice.data.index.ngrams import ngrams, words_of
from apprentice.data.index.row_filters import (
    FilterResult,
    PassageIndex,
    RowMeasures,
    choose_rows,
    limit_rows,
    measure_rows,
    merge_passages,
    passages_of,
)
from apprentice.data.sampling.permutation import Keys, Numbers, key_of
from apprentice.data.sources.locate import Reader, Source
from apprentice.recipe import Filters, Recipe
from apprentice.tasks.schema import Task

CHUNK_ROWS = 8192  # of one call
SHOWN_MATCHES = 1000  # at most, in the report
# (function, arguments of calls) → results in order
RunCalls = Callable[[Callable[..., Any], Iterator[tuple[Any, ...]]], Iterator[Any]]


class TaskRows(NamedTuple):
    """One task with its usable rows; `train` is None for a task that is not trained on."""

    task: Task
    train_source: Source | None
    train: Numbers | None
    test_source: Source | None
    test: Numbers


def apply_filters(
    candidates: Sequence[TaskRows], recipe: Recipe, run: RunCalls
) -> tuple[dict[str, FilterResult], dict[str, Any] | None]:
    """Task → rows kept, for each task that is trained on; and the contamination report, None without `filters.decontaminate`.

    A task without usable training rows is missing from the result if any filter is set. Raises `DataError` if a source cannot be
    read.
    """
    settings, most, seed = recipe.data.filters, recipe.data.mixture.max_rows, recipe.seed
    trained = [(one, one.train) for one in candidates if one.train is not None]
    if settings == Filters():  # no filter is set, so no row has to be read
        kept = {one.task.name: limit_rows(train, most, key_of(seed, one.task.name, "max rows")) for one, train in trained}
        return {
            one.task.name: FilterResult(
                kept[one.task.name],
                {"max_rows": len(train) - len(kept[one.task.name])} if len(kept[one.task.name]) < len(train) else {},
                [],
            )
            for one, train in trained
        }, None
    tests = _test_passages(candidates, settings, run) if settings.decontaminate else merge_passages([])
    known = np.unique(tests.hashes)
    chosen = {}
    for one, train in trained:
        calls = ((one.task, _reader(one.train_source), part, settings, known) for part in _chunks(train))
        parts = list(run(_measured, calls))
        whole = RowMeasures(*(np.concatenate(columns) for columns in zip(*parts, strict=True))) if parts else None
        if whole is not None:
            chosen[one.task.name] = choose_rows(one.task.name, whole, settings, most, seed)
    return chosen, _report(candidates, chosen, tests, settings.ngram) if settings.decontaminate else None


def report_contamination(candidates: Sequence[TaskRows], recipe: Recipe, run: RunCalls) -> dict[str, Any]:
    """The contamination report on test rows that share a passage with training rows; no training row is dropped for it.

    Raises `DataError` if a source cannot be read.
    """
    filters = Filters(decontaminate=True, ngram=recipe.data.filters.ngram)
    mixture = recipe.data.mixture.model_copy(update={"max_rows": None})
    data = recipe.data.model_copy(update={"filters": filters, "mixture": mixture})
    report = apply_filters(candidates, recipe.model_copy(update={"data": data}), run)[1]
    assert report is not None, "passages were looked for"
    for counts in report["tasks"].values():
        counts["training_rows_kept"] = counts.pop("training_rows_dropped")
    return report


def _test_passages(candidates: Sequence[TaskRows], settings: Filters, run: RunCalls) -> PassageIndex:
    labels = [number for number, one in enumerate(candidates) for _ in _chunks(one.test)]
    calls = ((_reader(one.test_source), part, settings.ngram) for one in candidates for part in _chunks(one.test))
    return merge_passages([(number, *result) for number, result in zip(labels, run(_test_part, calls), strict=True)])


def _measured(task: Task, reader: Reader, numbers: Numbers, settings: Filters, tests: Keys) -> RowMeasures:
    return measure_rows(task, reader.rows(numbers), numbers, settings, tests)


def _test_part(reader: Reader, numbers: Numbers, length: int) -> tuple[Keys, Numbers]:
    return passages_of(reader.rows(numbers), numbers, length)


def _reader(source: Source | None) -> Reader:
    assert source is not None, "rows without a source"
    return Reader(source, 1)


def _chunks(rows: Numbers) -> list[Numbers]:
    return [rows[start : start + CHUNK_ROWS] for start in range(0, len(rows), CHUNK_ROWS)]


def _report(candidates: Sequence[TaskRows], chosen: Mapping[str, FilterResult], tests: PassageIndex, length: int) -> dict[str, Any]:
    """The content of `contamination.json`: for each scored task, how many test rows share a passage with training rows.

    Keys: `ngram` (words of a passage), `tasks` (task → counts), `matches` (at most `SHOWN_MATCHES` pairs of rows, with the words).
    """
    owners: dict[int, list[tuple[int, int]]] = {}  # passage → (task, test row)
    matched_hashes = np.array(sorted({passage for one in chosen.values() for _, passage in one.contaminated}), np.uint64)
    for place in np.flatnonzero(np.isin(tests.hashes, matched_hashes)).tolist():
        owners.setdefault(int(tests.hashes[place]), []).append((int(tests.tasks[place]), int(tests.rows[place])))
    rows_of: dict[int, set[int]] = {}
    sources: dict[int, dict[str, int]] = {}
    matches: list[dict[str, Any]] = []
    by_name = {one.task.name: one for one in candidates}
    for name, choice in chosen.items():
        for row, passage in choice.contaminated:
            for number in {task for task, _ in owners[passage]}:
                sources.setdefault(number, {})[name] = sources.get(number, {}).get(name, 0) + 1
            for number, test_row in owners[passage]:
                rows_of.setdefault(number, set()).add(test_row)
            if len(matches) < SHOWN_MATCHES:
                number, test_row = owners[passage][0]
                where = {"test_task": candidates[number].task.name, "test_row": test_row}
                words = _passage(by_name[name], row, passage, length)
                matches.append({"task": name, "row": row, **where, "passage": words})
    scored = {
        one.task.name: {
            "test_rows": len(one.test),
            "shared": len(rows_of.get(number, ())),
            "share": round(len(rows_of.get(number, ())) / len(one.test), 4),
            "training_rows_dropped": dict(sorted(sources.get(number, {}).items())),
        }
        for number, one in enumerate(candidates)
        if len(one.test)
    }
    return {"ngram": length, "tasks": scored, "matches": matches}


def _passage(candidate: TaskRows, row: int, passage: int, length: int) -> str:
    """The words of a training row that hash to `passage`."""
    words = words_of(_reader(candidate.train_source).rows([row])[0], only_texts=True)
    hashes, _, starts = ngrams([words], length)
    flat = [word for text in words for word in text]
    start = int(starts[np.flatnonzero(hashes == np.uint64(passage))[0]])
    return " ".join(flat[start : start + length])
