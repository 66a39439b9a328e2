"""Rendering of a window: `data.window` consecutive plan positions become packed rows, independent of every other window.

    positions [w·n, (w+1)·n) of the plan ─▶ rows of the sources ─▶ examples ─▶ token ids ─▶ packed rows, reordered

The columns of packed rows are NumPy arrays with one entry a row. A causal model (`Corpus.family`) reads prompt and answer
as one sequence:

    input_ids        int32 (length,)    padded with the tokenizer's padding id
    positions        int32 (length,)    restarting at 0 with every example and with the padding
    segment_ids      int32 (length,)    1, 2, … and 0 for padding
    loss_mask        uint8 (length,)    1 on the tokens that are trained on: answer and end

For an encoder-decoder the same three columns hold the prompts (with the end tokens that its tokenizer adds), and the answers
have columns of their own. `length` is `Corpus.row_length` and `target_length` is `Corpus.target_length`:

    input_ids, positions, segment_ids       int32 (length,)         the encoder's side
    target_ids                              int32 (target_length,)  answers and ends: the labels, not shifted, padded as above
    target_positions, target_segment_ids    int32 (target_length,)  an example has the same segment number on both sides
    loss_mask                               uint8 (target_length,)  1 on answers and ends; a target is never an input of itself

The decoder's input ids are `packing.decoder_inputs(target_ids, target_positions, start_id)`. Attention stays inside equal
segment numbers: encoder to encoder, decoder to earlier decoder, decoder to encoder; 0 is padding.

A preference pair is two segments of a causal model in one row, the better answer before the worse one: segments 1 and 2 are
the first pair, 3 and 4 the second. Such rows have one column more:

    reference        float32 (any,)     log-probabilities of the answers by the reference model, two a pair; zeros without one

Where the recipe names classes of mixed-quality data (`data.qualities`), there is one more column:

    example_weights  float32 (any,)     weight in the loss of each example's target tokens

All rows have these columns, in which a pair counts as one example:

    window, row      int64, int32       number of the window, and of the row in it
    window_rows      int32              number of rows of the window
    examples         int64 (any,)       plan positions of the row's examples, in row order
    example_tasks    int32 (any,)       number of each example's task in `Corpus.tasks`
    example_targets  int32 (any,)       number of each example's tokens that are trained on
    dropped          str                on row 0 of a window, JSON: task → reason → number of examples dropped or cut; else empty
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, count
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_format import Exemplar
from apprentice.data.encoding.render import Renderer
from apprentice.data.encoding.tokenize import Tokenized, drop_reason
from apprentice.data.packing import Rows, build_pairs, build_rows, pack, pack_pairs
from apprentice.data.sampling.permutation import below, draw, key_of, permute
from apprentice.data.sampling.plan import Draw
from apprentice.errors import DataError, RowError
from apprentice.tasks.schema import Example, Task

PROBE_EXAMPLES, PROBE_TOKENS = 8, 512  # that two models are compared on, in the slowest place: one core, in float32
PROBE_AMONG = 64  # examples in the plan's order, of which the shortest are taken


class _Item(NamedTuple):
    """One tokenized example (or pair), not yet packed."""

    number: int  # position in the plan, or the source's row number for validation
    task: int  # number in `Corpus.tasks`
    row: int  # in the task's training source
    tokens: Tokenized


class Prompt(NamedTuple):
    """One prompt of an on-policy run, which the model itself answers."""

    position: int  # in the plan
    task: int  # number in `Corpus.tasks`
    ids: list[int]


class Probe(NamedTuple):
    """A few examples of a run, which two models are compared on."""

    rows: Literal["validation", "training"]  # where they are from
    examples: tuple[Tokenized, ...]


class WindowRenderer:
    """Renders windows, validation rows and prompts of a corpus.

    Keeps open files and cached row groups, but no state that a result depends on: any window may be rendered first.
    """

    def __init__(self, corpus: Corpus) -> None:
        self.corpus = corpus
        self._renderer = Renderer(corpus.tasks, corpus.indices)
        self._task_number = {task.name: number for number, task in enumerate(corpus.tasks)}

    def window(self, window: int) -> Rows:
        """The packed rows of one window, in an order keyed by (seed, window); no rows if all its examples were dropped.

        Raises `DataError` if a source cannot be read.
        """
        recipe = self.corpus.recipe
        draws = self.corpus.plan.draws(window * recipe.data.window, (window + 1) * recipe.data.window)
        items, counts = self._items(draws)
        rows = _packed(self.corpus, items)
        if self.corpus.strategy == "none":
            rows = _by_length(items, rows, recipe.training.global_batch, key_of(recipe.seed, "rows", window))
        else:
            # Best fit puts the longest examples into the first rows; without a shuffle, lengths would come in waves.
            order = permute(np.arange(len(rows)), max(len(rows), 1), key_of(recipe.seed, "rows", window))
            rows = [rows[number] for number in order]
        return self._columns(items, rows, window, counts)

    def validation(self, limit_rows: int) -> Rows:
        """At most `limit_rows` packed rows of zero-shot validation examples, in the mixture's proportions until a task runs out.

        In these rows `examples` are row numbers in the source, not plan positions.
        """
        items: list[_Item] = []
        room = limit_rows * self.corpus.row_length
        for draws in _validation_draws(self.corpus):
            found = [item._replace(number=item.row) for item in self._items(draws)[0]]
            ends = np.cumsum([_room_of(self.corpus, item) for item in found])
            items += found[: int(np.searchsorted(ends, room, side="right"))]
            room -= int(ends[-1]) if found else 0
            if room <= 0:
                break
        rows = _packed(self.corpus, items)
        while len(rows) > limit_rows:  # packing leaves some padding, so that the examples may need more rows
            del items[-max(1, len(items) // 50) :]
            rows = _packed(self.corpus, items)
        return self._columns(items, rows, 0, {})

    def zero_shot(self, task: Task, rows: Sequence[int]) -> Rows:
        """Packed rows of these training rows of `task`, each by the task's first template; `examples` are source row numbers."""
        template = (task.scored_templates or task.templates)[0].name
        draws = [Draw(row, task.name, "zero_shot", template, row, (), 0) for row in rows]
        items, _ = self._items(draws)
        return self._columns(items, _packed(self.corpus, items), 0, {})

    def prompts(self, window: int) -> list[Prompt]:
        """The prompts of one window of an on-policy run, in plan order; prompts that do not fit are left out."""
        size = self.corpus.recipe.data.window
        items, _ = self._items(self.corpus.plan.draws(window * size, (window + 1) * size))
        return [Prompt(item.number, item.task, item.tokens.ids) for item in items]

    def probe(self, windows: int) -> Probe:
        """The shortest of the first validation examples, or of those in the first `windows` of training where there are none.

        The same ones whenever it is asked: at least one, at most `PROBE_EXAMPLES` with `PROBE_TOKENS` together. Raises `DataError`
        if no row can be used.
        """
        size = self.corpus.recipe.data.window
        training = (self.corpus.plan.draws(number * size, (number + 1) * size) for number in range(windows))
        sources: dict[Literal["validation", "training"], Iterable[list[Draw]]] = {
            "validation": _validation_draws(self.corpus),
            "training": training,
        }
        for rows, stretches in sources.items():
            for draws in stretches:
                if items := self._items(draws)[0][:PROBE_AMONG]:
                    ascending = sorted((item.tokens for item in items), key=lambda tokens: tokens.size)[:PROBE_EXAMPLES]
                    tokens = list(accumulate(one.size for one in ascending))
                    fitting = sum(total <= PROBE_TOKENS for total in tokens)
                    return Probe(rows, tuple(ascending[: max(1, fitting)]))
        raise DataError("none of the run's rows can be used any more, so the export cannot be checked; put its data back.")

    def _items(self, draws: Sequence[Draw]) -> tuple[list[_Item], dict[str, Counter[str]]]:
        """The usable examples of these draws, and task → reason → number of examples dropped or cut."""
        counts: dict[str, Counter[str]] = {}
        kept: list[Draw] = []
        given: list[tuple[Example, Sequence[Exemplar]]] = []
        for drawn, found in zip(draws, self._renderer.of_draws(draws), strict=True):
            if isinstance(found, RowError):
                counts.setdefault(drawn.task, Counter())[found.reason] += 1
            else:
                kept.append(drawn)
                given.append(found)
        items: list[_Item] = []
        for drawn, (example, shots), tokens in zip(kept, given, self.corpus.encode(given), strict=True):
            if tokens is not None:
                items.append(_Item(drawn.position, self._task_number[drawn.task], drawn.row, tokens))
            if reason := drop_reason(self.corpus.layout, example, shots) if tokens is None else tokens.truncated:
                counts.setdefault(drawn.task, Counter())[reason] += 1
        return items, counts

    def _columns(self, items: Sequence[_Item], rows: Sequence[Sequence[int]], window: int, counts: dict[str, Counter[str]]) -> Rows:
        texts = [answer for item in items for answer in item.tokens.answers]
        lengths = _numbers(len(text.ids) for text in texts)
        prompts = _numbers(text.prompt_length for text in texts)
        ids = np.fromiter(chain.from_iterable(text.ids for text in texts), np.int32, int(lengths.sum()))
        laid = [[2 * place + side for place in row for side in (0, 1)] for row in rows] if self.corpus.has_pairs else rows
        sizes = (self.corpus.row_length, self.corpus.target_length)
        pad_id = self.corpus.layout.tokenizer.pad_id
        if sizes[1] is None:
            columns = build_rows(ids, lengths, prompts, laid, sizes[0], pad_id, _untrained(texts, lengths))
        else:
            columns = build_pairs(ids, lengths, prompts, rows, (sizes[0], sizes[1]), pad_id)
        order = _numbers(chain.from_iterable(rows))
        per_example: dict[str, NDArray[Any]] = {
            "examples": _numbers(item.number for item in items)[order],
            "example_tasks": _numbers(item.task for item in items)[order].astype(np.int32),
            "example_targets": _numbers(item.tokens.target_tokens for item in items)[order].astype(np.int32),
        }
        if self.corpus.qualities:
            per_example["example_weights"] = np.array([self._weight(item) for item in items], np.float32)[order]
        if self.corpus.has_pairs:
            per_example["reference"] = np.array([self._reference(item) for item in items], np.float32).reshape(-1, 2)[order]
        ends = np.cumsum([len(row) for row in rows], dtype=np.int64)
        cut = {name: np.split(values, ends[:-1]) if rows else [] for name, values in per_example.items()}
        columns |= {name: _ragged([part.reshape(-1) for part in parts]) for name, parts in cut.items()}
        columns["window"] = np.full(len(rows), window, np.int64)
        columns["row"] = np.arange(len(rows), dtype=np.int32)
        columns["window_rows"] = np.full(len(rows), len(rows), np.int32)
        columns["dropped"] = np.full(len(rows), "", object)
        if counts and rows:
            columns["dropped"][0] = json.dumps({task: dict(counts[task]) for task in sorted(counts)})
        return columns

    def _weight(self, item: _Item) -> float:
        """The loss weight of the quality class that the example's task belongs to."""
        qualities = self.corpus.recipe.data.qualities or {}
        return qualities[self.corpus.qualities[self.corpus.tasks[item.task].name]].weight

    def _reference(self, item: _Item) -> tuple[float, float]:
        """Log-probabilities of a pair's better and worse answer by the reference model; zeros without one."""
        if self.corpus.reference is None:
            return 0.0, 0.0
        return self.corpus.reference[self.corpus.tasks[item.task].name].of(item.row)


def _untrained(texts: Sequence[Tokenized], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    """Offsets, in the concatenation of all examples, of a conversation's later questions: tokens that are not trained on."""
    starts = np.cumsum(lengths) - lengths
    parts = [
        np.arange(start + first, start + last)
        for start, text in zip(starts.tolist(), texts, strict=True)
        for first, last in text.untrained
    ]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def _packed(corpus: Corpus, items: Sequence[_Item]) -> list[list[int]]:
    if corpus.target_length is None:
        return pack([item.tokens.size for item in items], corpus.row_length, corpus.strategy)
    pairs = [(item.tokens.prompt_length, len(item.tokens.ids) - item.tokens.prompt_length) for item in items]
    return pack_pairs(pairs, (corpus.row_length, corpus.target_length), corpus.strategy)


def _room_of(corpus: Corpus, item: _Item) -> int:
    """Tokens of a row's `row_length` that an example takes; of two sides, the one that takes the larger part of its side."""
    if corpus.strategy == "none":
        return corpus.row_length
    if corpus.target_length is None:
        return item.tokens.size
    targets = len(item.tokens.ids) - item.tokens.prompt_length
    return max(item.tokens.prompt_length, -(-targets * corpus.row_length // corpus.target_length))


def _by_length(items: Sequence[_Item], rows: list[list[int]], together: int, key: int) -> list[list[int]]:
    """Orders unpacked rows: groups of `together` rows of similar length, the groups in an order keyed by `key`.

    A step takes one such group and pads little, while the order of lengths over training stays random.
    """
    ascending = sorted(rows, key=lambda row: items[row[0]].tokens.size)
    groups = [ascending[start : start + together] for start in range(0, len(ascending), together)]
    return [row for number in permute(np.arange(len(groups)), max(len(groups), 1), key) for row in groups[number]]


def _validation_draws(corpus: Corpus) -> Iterator[list[Draw]]:
    """Validation rows in chunks: follows the plan's sequence of tasks, and takes the next validation row of each."""
    size = corpus.recipe.data.window
    waiting = {task.name: _held_back(corpus, task) for task in corpus.tasks}
    for window in count():
        turns = corpus.plan.draws(window * size, (window + 1) * size)
        found = [drawn for turn in turns if (drawn := next(waiting[turn.task], None)) is not None]
        if not found:
            return
        yield found


def _held_back(corpus: Corpus, task: Task) -> Iterator[Draw]:
    """The validation rows of one task, in an order and with templates drawn by the seed."""
    seed, rows = corpus.recipe.seed, corpus.indices[task.name].validation
    templates = task.scored_templates or task.templates
    order = rows[permute(np.arange(len(rows)), max(len(rows), 1), key_of(seed, task.name, "validation"))]
    which = below(draw(key_of(seed, task.name, "validation templates"), order), len(templates))
    for number, row in zip(which.tolist(), order.tolist(), strict=True):
        yield Draw(0, task.name, "zero_shot", templates[number].name, row, (), 0)


def _numbers(values: Iterable[int]) -> NDArray[np.int64]:
    return np.fromiter(values, np.int64)


def _ragged(parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """An object array with one array a row; `np.array` would build a 2-D array where all are equally long."""
    column = np.empty(len(parts), object)
    column[:] = parts
    return column
