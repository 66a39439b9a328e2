"""Rendering of a window: `data.window` consecutive plan positions become packed rows, independent of every other window.

    positions [w·n, (w+1)·n) ─plan─▶ draws ─example_reader─▶ token ids ─row_columns─▶ packed rows, reordered by (seed, window)

With `data.window` n = 3 and rows of 8 tokens, window 1 has the positions 3, 4 and 5. If their examples have 6, 3 and 5 tokens, best
fit makes two rows of them, which a keyed permutation puts into the order of training, such as:

    row 0    5 5 5 5 5 4 4 4      examples 5 and 4
    row 1    3 3 3 3 3 3 · ·      example 3 and padding

The columns of packed rows are listed in `apprentice.data.row_columns`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import numpy as np

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.tokenize import Tokenized
from apprentice.data.example_reader import DropCounts, ExampleReader, TokenizedDraw
from apprentice.data.packing import Rows
from apprentice.data.row_columns import assign_rows, build_columns, row_share
from apprentice.data.sampling.permutation import key_of, permute
from apprentice.data.sampling.plan import Draw
from apprentice.data.sampling.validation_draws import validation_draws
from apprentice.errors import DataError
from apprentice.tasks.schema import Task

PROBE_EXAMPLES, PROBE_TOKENS = 8, 512  # that two models are compared on, in the slowest place: one core, in float32
PROBE_AMONG = 64  # examples in the plan's order, of which the shortest are taken


class Prompt(NamedTuple):
    """One prompt of an on-policy run, which the model itself answers."""

    position: int  # in the plan
    task: int  # number in `Corpus.tasks`
    row: int  # in the task's training source
    ids: list[int]
    text: str  # instruction and input
    references: tuple[str, ...]  # all answers that count as right; none where the task has no answers


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
        self._reader = ExampleReader(corpus)

    def window(self, window: int) -> Rows:
        """The packed rows of one window, in an order keyed by (seed, window); no rows if all its examples were dropped.

        Raises `DataError` if a source cannot be read.
        """
        examples, counts = self._reader.read(self._draws(window))
        rows, recipe = assign_rows(self.corpus, examples), self.corpus.recipe
        key = key_of(recipe.seed, "rows", window)
        if self.corpus.strategy == "none":
            rows = _group_by_length(examples, rows, recipe.lanes.rows, key)
        else:
            # Best fit puts the longest examples into the first rows; without a shuffle, lengths would come in waves.
            order = permute(np.arange(len(rows)), max(len(rows), 1), key)
            rows = [rows[number] for number in order]
        return build_columns(self.corpus, examples, rows, window, counts)

    def empty_window_drops(self, window: int) -> DropCounts | None:
        """Drop counts of a window without rows, which no row carries; None for a window with rows."""
        examples, counts = self._reader.read(self._draws(window))
        return None if examples else counts

    def validation(self, limit_rows: int) -> Rows:
        """At most `limit_rows` packed rows of zero-shot validation examples, in the mixture's proportions until a task runs out.

        In these rows `examples` are row numbers in the source, not plan positions.
        """
        examples: list[TokenizedDraw] = []
        room = limit_rows * self.corpus.row_length
        for draws in self._validation_draws():
            chunk = [example._replace(number=example.row) for example in self._reader.read(draws)[0]]
            ends = np.cumsum([row_share(self.corpus, example) for example in chunk])
            examples += chunk[: int(np.searchsorted(ends, room, side="right"))]
            room -= int(ends[-1]) if chunk else 0
            if room <= 0:
                break
        rows = assign_rows(self.corpus, examples)
        while len(rows) > limit_rows:  # packing leaves some padding, so that the examples may need more rows
            del examples[-max(1, len(examples) // 50) :]
            rows = assign_rows(self.corpus, examples)
        return build_columns(self.corpus, examples, rows)

    def zero_shot(self, task: Task, rows: Sequence[int]) -> Rows:
        """Packed rows of these training rows of `task`, each by the task's first template; `examples` are source row numbers."""
        template = (task.scored_templates or task.templates)[0].name
        examples, _ = self._reader.read([Draw(row, task.name, "zero_shot", template, row, (), 0) for row in rows])
        return build_columns(self.corpus, examples, assign_rows(self.corpus, examples))

    def prompts(self, window: int) -> list[Prompt]:
        """The prompts of one window of an on-policy run, in plan order; prompts that do not fit are left out."""
        examples, _ = self._reader.read(self._draws(window))
        return [_prompt(example) for example in examples]

    def probe(self, windows: int, most: int = PROBE_EXAMPLES, most_tokens: int = PROBE_TOKENS) -> Probe:
        """The shortest of the first validation examples, or of those in the first `windows` of training where there are none.

        The same ones at each call: at least one, at most `most` with `most_tokens` together. Raises `DataError` if no
        row can be used.
        """
        sources: dict[Literal["validation", "training"], Iterable[list[Draw]]] = {
            "validation": self._validation_draws(),
            "training": map(self._draws, range(windows)),
        }
        for rows, chunks in sources.items():
            for draws in chunks:
                if examples := self._reader.read(draws)[0][:PROBE_AMONG]:
                    ascending = sorted((example.tokens for example in examples), key=lambda tokens: tokens.size)[:most]
                    totals = list(accumulate(tokens.size for tokens in ascending))
                    fitting = sum(total <= most_tokens for total in totals)
                    return Probe(rows, tuple(ascending[: max(1, fitting)]))
        raise DataError("none of the run's rows can be used any more, so the export cannot be checked; put its data back.")

    def _draws(self, window: int) -> list[Draw]:
        size = self.corpus.recipe.data.window
        return self.corpus.plan.draws(window * size, (window + 1) * size)

    def _validation_draws(self) -> Iterator[list[Draw]]:
        corpus, recipe = self.corpus, self.corpus.recipe
        return validation_draws(corpus.plan, corpus.tasks, corpus.indices, recipe.seed, recipe.data.window)


def _prompt(draw: TokenizedDraw) -> Prompt:
    example = draw.example
    text = "\n\n".join(filter(None, (example.instruction, example.input)))
    references = tuple(filter(None, example.references or (example.target,)))
    return Prompt(draw.number, draw.task, draw.row, draw.tokens.ids, text, references)


def _group_by_length(examples: Sequence[TokenizedDraw], rows: list[list[int]], group_rows: int, key: int) -> list[list[int]]:
    """Orders unpacked rows: groups of `group_rows` rows of similar length, the groups in an order keyed by `key`.

    A step takes one such group of each lane and pads little, while the order of lengths over training stays random.
    """
    ascending = sorted(rows, key=lambda row: examples[row[0]].tokens.size)
    groups = [ascending[start : start + group_rows] for start in range(0, len(ascending), group_rows)]
    return [row for number in permute(np.arange(len(groups)), max(len(groups), 1), key) for row in groups[number]]
