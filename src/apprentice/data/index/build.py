"""Builds the frozen index: the usable rows of each task, split into training, validation and test rows. Made once per run.

    sources ──scan──▶ usable rows ──filters──▶ kept training rows ──▶ <run>/index/<task>.npz

A row is usable if one of the task's templates renders it. The index is stored in the run folder, so that a resumed run draws
from exactly the rows it began with; sources or tasks that have changed since are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from apprentice.data.encoding.prompt_contract import layout_of
from apprentice.data.encoding.prompt_format import Exemplar, Layout
from apprentice.data.encoding.tokenize import encode, encode_labelled, encode_pairs
from apprentice.data.index.apply_filters import TaskRows, apply_filters, report_contamination
from apprentice.data.index.row_filters import FilterResult
from apprentice.data.index.task_index import INDEX_FILE, TaskIndex, index_bytes, index_file, indexed_tasks, read_index
from apprentice.data.sampling.exemplars import ExemplarPool
from apprentice.data.sampling.permutation import Numbers, below, draw, key_of, permute
from apprentice.data.sources.locate import MissingSourceError, Reader, Source, Split, is_unchanged, resolve
from apprentice.errors import DataError, RowError
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Filters, Recipe
from apprentice.run.identity import FORMAT
from apprentice.storage import Folder
from apprentice.tasks.definition import definition_of
from apprentice.tasks.schema import Example, Task

CHUNK_ROWS = 8192  # scanned by one Ray task
SAMPLE_ROWS = 128  # of each task, for its mean lengths
SHOWN_REJECTS = 10
IN_FLIGHT = 16  # Ray tasks of the filters at a time
CONTAMINATION_FILE = "contamination.json"  # in the index folder: report on passages that training and test rows share


_Sources = tuple[Source | None, Source | None]  # training and test rows
_Job = tuple[Task, Source | None, float]  # the last one is the share of rows for validation


class _Reject(NamedTuple):
    split: Split
    row: int
    reason: str
    message: str


class _Scan(NamedTuple):
    """The scan of a range of one source's rows."""

    kept: Numbers
    validation: Numbers
    rejects: list[_Reject]


class TaskIndices(NamedTuple):
    """The index of several tasks in memory; keys are task names."""

    tasks: dict[str, TaskIndex]
    rejects: dict[str, list[_Reject]]
    contamination: dict[str, Any] | None  # report on passages that test and training rows share; None where it was not made


def is_held_out(task: Task, hold_out: Sequence[str]) -> bool:
    """Whether `task` is never trained on, by its own name or its cluster's."""
    return not {task.name, task.cluster}.isdisjoint(hold_out)


def load_or_build_index(
    tasks: Sequence[Task],
    recipe: Recipe,
    folder: Folder,
    cache: Folder,
    tokenizer: Tokenizer,
    *,
    parallel: bool = True,
    rules: int = FORMAT,
) -> dict[str, TaskIndex]:
    """The index of every task: read from `folder` if it is complete there, else built and written there.

    An index that an interrupted call left incomplete is built again as a whole, because the filters compare all tasks. `rules` is
    the format of the run, which decides how files are read. `parallel` scans with Ray, which must be initialised; otherwise this
    process does. Raises `DataError` for a source that cannot be used (see `resolve`), that has changed since it was frozen, or that
    has more unusable rows than `data.max_bad_rows`.
    """
    known = indexed_tasks(folder)
    if (folder / INDEX_FILE).exists() or all(task.name in known for task in tasks):
        return {task.name: _load(task, recipe, folder, cache, rules) for task in tasks}
    built = _build(tasks, recipe, cache, tokenizer, parallel=parallel, rules=rules)
    folder.delete()
    _write(built, tasks, folder)
    return built.tasks


def contamination_in(folder: Folder) -> dict[str, Any]:
    """Task → contamination report of the index in `folder` (see `apply_filters`); empty where none was made."""
    file = folder / CONTAMINATION_FILE
    return dict(file.read_json()["tasks"]) if file.exists() else {}


def index_scored_tasks(
    tasks: Sequence[Task],
    trained: Mapping[str, tuple[Task, TaskIndex]],
    recipe: Recipe,
    cache: Folder,
    tokenizer: Tokenizer,
    *,
    parallel: bool = True,
    rules: int = FORMAT,
) -> TaskIndices:
    """The index of tasks that a run is only scored on, in memory; the run's own index is not touched.

    `trained` are the tasks of the run with their indices. Unless it is empty, the result has a contamination report: how many test
    rows share a passage with rows that were trained on.
    """
    plain = recipe.model_copy(update={"data": recipe.data.model_copy(update={"filters": Filters()})})
    built = _build(tasks, plain, cache, tokenizer, parallel=parallel, rules=rules)
    if not trained:
        return built
    candidates = [TaskRows(task, index.train_source, index.train, None, _numbers([])) for task, index in trained.values()] + [
        TaskRows(task, None, None, index.test_source, index.test) for task, index in zip(tasks, built.tasks.values(), strict=True)
    ]
    return built._replace(contamination=report_contamination(candidates, recipe, _run_on_ray if parallel else _run_here))


def _build(
    tasks: Sequence[Task], recipe: Recipe, cache: Folder, tokenizer: Tokenizer, *, parallel: bool, rules: int
) -> TaskIndices:
    sources: dict[str, _Sources] = {task.name: _resolve_splits(task, recipe, cache, rules) for task in tasks}
    rejects = {}
    scans = list(zip(tasks, *_scanned(tasks, sources, recipe, parallel=parallel), strict=True))
    for task, train, test in scans:
        rejects[task.name] = [*train.rejects, *test.rejects]
        _refuse_bad_rows(task, rejects[task.name], sum(source.rows for source in sources[task.name] if source), recipe)
    chosen, contamination = apply_filters(
        [
            TaskRows(task, sources[task.name][0], _trained(task, train, recipe), sources[task.name][1], test.kept)
            for task, train, test in scans
        ],
        recipe,
        _run_on_ray if parallel else _run_here,
    )
    indices = {}
    for task, train, test in scans:
        choice = chosen.get(task.name, FilterResult(train.kept, {}, []))
        means = _mean_tokens(task, sources[task.name][0], choice.kept, layout_of(recipe, tokenizer), recipe)
        indices[task.name] = TaskIndex(
            task.name,
            *sources[task.name],
            choice.kept,
            train.validation,
            test.kept,
            *means,
            rejects=dict(Counter(reject.reason for reject in rejects[task.name]).most_common()),
            filtered=choice.dropped,
        )
    return TaskIndices(indices, rejects, contamination)


def _write(built: TaskIndices, tasks: Sequence[Task], folder: Folder) -> None:
    """Writes the index; `INDEX_FILE` comes last and makes it complete."""
    if built.contamination is not None:
        (folder / CONTAMINATION_FILE).write_json(built.contamination)
    for task in tasks:
        lines = [json.dumps({"task": task.name, **reject._asdict()}, ensure_ascii=False) for reject in built.rejects[task.name]]
        (folder / f"{task.name}.rejects.jsonl").write_text("".join(f"{line}\n" for line in lines))
        index_file(folder, task).write_bytes(index_bytes(built.tasks[task.name], task))
    (folder / INDEX_FILE).write_json({"version": 2, "tasks": [task.name for task in tasks]})


def _resolve_splits(task: Task, recipe: Recipe, cache: Folder, rules: int) -> _Sources:
    return (
        resolve(task, "train", root=recipe.data.root, cache=cache, rules=rules),
        resolve(task, "test", root=recipe.data.root, cache=cache, rules=rules),
    )


def _load(task: Task, recipe: Recipe, folder: Folder, cache: Folder, rules: int) -> TaskIndex:
    """The index of `task` in `folder`, with its sources resolved again, since files may have moved.

    If no declared place exists any more, the sources stored in the index are used while they are unchanged. Raises `DataError` if
    rows, columns or the task's definition have changed.
    """
    file = index_file(folder, task)
    index, definition = read_index(folder, task)
    kept = (index.train_source, index.test_source)
    try:
        sources = _resolve_splits(task, recipe, cache, rules)
    except MissingSourceError:
        if not all(is_unchanged(source) for source in kept if source):
            raise
        sources = kept
    for split, old, new in zip(("train", "test"), kept, sources, strict=True):
        same_rows = new is not None and old.has_rows_of(new) if old else new is None
        if not same_rows or (old and new and any(new.columns.get(name) != column for name, column in old.columns.items())):
            source = new or old
            where = source and (source.named or source.files[0])
            raise DataError(
                f"task {task.name!r}: the {split} {'columns' if same_rows else 'rows'} ({where}) have changed since the run's"
                " index was frozen; put the old file back, start over with --restart, or choose another `name`."
            )
    if definition != definition_of(task):
        raise DataError(
            f"task {task.name!r}: its templates or answers have changed since the run's index was frozen ({file}); undo that,"
            " start over with --restart, or choose another `name`."
        )
    return TaskIndex(**(vars(index) | {"train_source": sources[0], "test_source": sources[1]}))


def _scanned(
    tasks: Sequence[Task], sources: Mapping[str, _Sources], recipe: Recipe, *, parallel: bool
) -> tuple[list[_Scan], list[_Scan]]:
    """(scans of training rows, scans of test rows), one of each a task."""
    jobs: list[_Job] = []
    for task in tasks:
        train, test = sources[task.name]
        validation = 0.0 if is_held_out(task, recipe.data.hold_out) else recipe.data.validation
        jobs += [(task, train, validation), (task, test, 0.0)]
    run = _scan_on_ray if parallel and tasks else _scan_here
    scans = list(run(jobs))
    return scans[::2], scans[1::2]


def _scan_here(jobs: Sequence[_Job]) -> Iterator[_Scan]:
    for task, source, validation in jobs:
        reader = Reader(source, 1) if source else None
        yield _concatenate([_scan(task, reader, start, stop, validation) for start, stop in _chunks(source)])


def _scan_on_ray(jobs: Sequence[_Job]) -> Iterator[_Scan]:
    import ray

    scan = ray.remote(_scan)
    pending = []
    for task, source, validation in jobs:
        reader = Reader(source, 1) if source else None
        shared, at = ray.put(task), ray.put(reader)
        pending.append([scan.remote(shared, at, start, stop, validation) for start, stop in _chunks(source)])
    for references in pending:
        yield _concatenate(_result(references))


def _trained(task: Task, train: _Scan, recipe: Recipe) -> Numbers | None:
    return None if is_held_out(task, recipe.data.hold_out) else train.kept


def _run_here(action: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    return (action(*call) for call in calls)


def _run_on_ray(action: Callable[..., Any], calls: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """The results of the calls in order; at most `IN_FLIGHT` run or wait at a time, so that results do not pile up."""
    import ray

    remote, waiting = ray.remote(action), deque[Any]()
    for call in calls:
        waiting.append(remote.remote(*call))
        if len(waiting) == IN_FLIGHT:
            yield _result(waiting.popleft())
    while waiting:
        yield _result(waiting.popleft())


def _result(reference: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        raise (error.cause if isinstance(error.cause, DataError) else error) from None


def _chunks(source: Source | None) -> list[tuple[int, int]]:
    rows = source.rows if source else 0
    return [(start, min(start + CHUNK_ROWS, rows)) for start in range(0, rows, CHUNK_ROWS)]


def _scan(task: Task, reader: Reader | None, start: int, stop: int, validation: float) -> _Scan:
    """The usable rows in [start, stop); a share `validation` of them, chosen by a hash of their content, is for validation."""
    kept, validation_rows, rejects = [], [], []
    assert reader is not None, "without a source there are no stretches to scan"
    for number, row in zip(range(start, stop), reader.rows(np.arange(start, stop)), strict=True):
        failure = _failure(task, row)
        if failure is not None:
            rejects.append(_Reject(reader.source.split, number, failure.reason, str(failure)))
        elif validation and _hash_share(row) < validation:
            validation_rows.append(number)
        else:
            kept.append(number)
    return _Scan(_numbers(kept), _numbers(validation_rows), rejects)


def _failure(task: Task, row: Mapping[str, Any]) -> RowError | None:
    """The first template's error if no template renders the row; None if one does."""
    first: RowError | None = None
    for template in task.templates:
        try:
            task.render(row, template)
            return None
        except RowError as error:
            first = first or error
            if error.reason in ("missing", "null"):
                break  # a fault of the row, whatever the template
    return first


def _hash_share(row: Mapping[str, Any]) -> float:
    """A number in [0, 1) from a hash of the row's content, so that equal rows are in the same split."""
    content = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(content.encode(), digest_size=8).digest(), "little") / 2**64


def _concatenate(scans: Sequence[_Scan]) -> _Scan:
    return _Scan(
        np.concatenate([_numbers([]), *(scan.kept for scan in scans)]),
        np.concatenate([_numbers([]), *(scan.validation for scan in scans)]),
        [reject for scan in scans for reject in scan.rejects],
    )


def _numbers(values: Sequence[int]) -> Numbers:
    return np.array(values, dtype=np.int64)


def _refuse_bad_rows(task: Task, rejects: Sequence[_Reject], rows: int, recipe: Recipe) -> None:
    allowed = recipe.data.max_bad_rows
    rejects = [reject for reject in rejects if reject.reason != "skipped"]  # a template skips rows on purpose
    if len(rejects) > allowed * rows:
        shown = "; ".join(f"{reject.split} row {reject.row}: {reject.message}" for reject in rejects[:SHOWN_REJECTS])
        raise DataError(
            f"task {task.name!r}: {len(rejects)} of {rows} rows are unusable, more than data.max_bad_rows = {allowed:g} allows;"
            f" mend the rows or the templates, or raise it. The first: {shown}"
        )


def _mean_tokens(task: Task, source: Source | None, kept: Numbers, layout: Layout, recipe: Recipe) -> tuple[float, float]:
    """Mean tokens of a zero-shot training example, and of its trained-on part, over a seeded sample of `SAMPLE_ROWS` rows."""
    if source is None or not len(kept):
        return 0.0, 0.0
    pool = ExemplarPool(recipe.seed, task.name, kept)  # its rows lie in few row groups
    places = np.arange(min(SAMPLE_ROWS, len(pool)))
    rows = pool.rows[permute(places, len(pool), key_of(recipe.seed, task.name, "sample"))]
    templates = task.scored_templates or task.templates
    which = below(draw(key_of(recipe.seed, task.name, "sample templates"), places), len(templates))
    examples = [_rendered(task, row, int(number)) for row, number in zip(Reader(source).rows(rows), which, strict=True)]
    usable = [example for example in examples if example is not None]
    if not usable:
        return 0.0, 0.0
    aim = recipe.training.aim
    if aim.labels or (aim.pairs and task.has_pairs):
        beside = [Exemplar("", "", example.target) for example in [*usable[1:], *usable[:1]]]  # another row's answers
        length, items = recipe.data.max_length, [(example, [other]) for example, other in zip(usable, beside, strict=True)]
        tokenized = encode_labelled(layout, items, length) if aim.labels else encode_pairs(layout, usable, length)
        pairs = [tokens for tokens in tokenized if tokens]
        return float(np.mean([pair.size for pair in pairs] or [0])), float(np.mean([pair.target_tokens for pair in pairs] or [0]))
    if any(example.has_turns for example in usable):
        encoded = [tokens for tokens in encode(layout, [(example, ()) for example in usable], recipe.data.max_length) if tokens]
        return (
            float(np.mean([len(tokens.ids) for tokens in encoded] or [0])),
            float(np.mean([tokens.target_tokens for tokens in encoded] or [0])),
        )
    prompts = layout.encode_prompts([layout.prompt(example.instruction, example.input) for example in usable])
    answers = [len(ids) + len(layout.end_ids) for ids in layout.encode_answers([example.target for example in usable])]
    whole = [min(len(ids) + answer, recipe.data.max_length) for ids, answer in zip(prompts, answers, strict=True)]
    return float(np.mean(whole)), float(np.mean(answers))


def _rendered(task: Task, row: Mapping[str, Any], number: int) -> Example | None:
    try:
        return task.render(row, (task.scored_templates or task.templates)[number])
    except RowError:
        return None
