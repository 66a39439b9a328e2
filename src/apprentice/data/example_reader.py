"""Reading of a plan's draws as tokenized examples: their rows are read, their templates rendered, and the texts tokenized."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.encoder import ExampleEncoder
from apprentice.data.encoding.render import Rendered, Renderer
from apprentice.data.encoding.tokenize import Tokenized
from apprentice.data.sampling.plan import Draw
from apprentice.errors import RowError
from apprentice.tasks.schema import Example

DropCounts = dict[str, Counter[str]]  # task → reason → number of examples dropped or cut


class TokenizedDraw(NamedTuple):
    """One draw as token ids; a pair's two answers are one draw."""

    number: int  # position in the plan, or the source's row number for validation
    task: int  # number in `Corpus.tasks`
    row: int  # in the task's training source
    tokens: Tokenized
    example: Example  # that was tokenized


class ExampleReader:
    """Reads draws of a corpus as tokenized examples; keeps sources open."""

    def __init__(self, corpus: Corpus) -> None:
        self._renderer = Renderer(corpus.tasks, corpus.indices, partner_seed=corpus.partner_seed)
        self._encoder = ExampleEncoder(corpus)
        self._task_number = {task.name: number for number, task in enumerate(corpus.tasks)}

    def read(self, draws: Sequence[Draw]) -> tuple[list[TokenizedDraw], DropCounts]:
        """The usable examples of these draws in order, and how many were dropped or cut.

        Raises `DataError` if a source cannot be read.
        """
        counts: DropCounts = {}
        rendered: list[tuple[Draw, Rendered]] = []
        for draw, result in zip(draws, self._renderer.render_draws(draws), strict=True):
            if isinstance(result, RowError):
                counts.setdefault(draw.task, Counter())[result.reason] += 1
            else:
                rendered.append((draw, result))
        examples: list[TokenizedDraw] = []
        encoded = self._encoder.encode([result for _, result in rendered])
        for (draw, result), tokens in zip(rendered, encoded, strict=True):
            if tokens is not None:
                examples.append(TokenizedDraw(draw.position, self._task_number[draw.task], draw.row, tokens, result.example))
            if reason := self._encoder.drop_reason(*result) if tokens is None else tokens.truncated:
                counts.setdefault(draw.task, Counter())[reason] += 1
        return examples, counts
