"""Rendering of draws: reads the rows of a range of the plan, all rows of a task at once, and applies their templates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from apprentice.data.encoding.prompt_format import Exemplar
from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sampling.exemplars import ExemplarPool
from apprentice.data.sampling.plan import Draw
from apprentice.data.sources.locate import Reader, Split
from apprentice.errors import DataError, RowError
from apprentice.tasks.schema import Example, Task

CACHED_GROUPS = 8  # row groups cached for each source: as many as a shuffle buffer of the plan has


class Rendered(NamedTuple):
    """A rendered draw."""

    example: Example
    exemplars: list[Exemplar]


class Renderer:
    """Renders rows of `tasks` by row number; opens the sources in `indices` when they are first read, and keeps them open.

    With a `partner_seed` every draw without exemplars gets one, another training row of its task that the seed decides on.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        indices: Mapping[str, TaskIndex],
        cached_groups: int = CACHED_GROUPS,
        partner_seed: int | None = None,
    ) -> None:
        self._tasks = {task.name: task for task in tasks}
        self._partner_seed = partner_seed
        self._indices = indices
        self._cached_groups = cached_groups
        self._readers: dict[tuple[str, Split], Reader] = {}
        self._pools: dict[str, ExemplarPool] = {}

    def example(self, task: str, split: Split, row: int, template: str) -> Example:
        """One row rendered by one template. Raises `RowError` if it cannot be rendered, `DataError` if it cannot be read."""
        fields = self._rows(task, split, [row])[row]
        return self._tasks[task].render(fields, self._tasks[task].template_by_name[template])

    def render_draw(self, draw: Draw) -> Rendered:
        """The example and exemplars of one draw. Raises `RowError` if the example cannot be rendered."""
        rendered = self.render_draws([draw])[0]
        if isinstance(rendered, RowError):
            raise rendered
        return rendered

    def render_draws(self, draws: Sequence[Draw]) -> list[Rendered | RowError]:
        """Every draw rendered, in order; the `RowError` in place of one that cannot be. Exemplars that cannot be are left out."""
        if self._partner_seed is not None:
            draws = [draw if draw.shots else draw._replace(shots=self._partner(draw, self._partner_seed)) for draw in draws]
        numbers_of: dict[str, set[int]] = {}
        for draw in draws:
            numbers_of.setdefault(draw.task, set()).update((draw.row, *draw.shots))
        rows = {task: self._rows(task, "train", numbers) for task, numbers in numbers_of.items()}
        return [self._rendered(draw, rows[draw.task]) for draw in draws]

    def _rendered(self, draw: Draw, rows: Mapping[int, Mapping[str, Any]]) -> Rendered | RowError:
        task = self._tasks[draw.task]
        template = task.template_by_name[draw.template]
        try:
            example = task.render(rows[draw.row], template)
        except RowError as error:
            return error
        exemplars = []
        for shot in draw.shots:
            try:
                shown = task.render(rows[shot], template)
            except RowError:
                continue
            exemplars.append(Exemplar(shown.instruction, shown.input, shown.target))
        return Rendered(example, exemplars)

    def _partner(self, draw: Draw, seed: int) -> tuple[int, ...]:
        if draw.task not in self._pools:
            self._pools[draw.task] = ExemplarPool(seed, draw.task, self._indices[draw.task].train)
        return self._pools[draw.task].of_row(draw.row, 1)

    def _rows(self, task: str, split: Split, numbers: Iterable[int]) -> dict[int, dict[str, Any]]:
        """Row number → row. Numbers are sorted first, so that every row group is read once."""
        ascending = sorted(numbers)
        return dict(zip(ascending, self._reader(task, split).rows(ascending), strict=True))

    def _reader(self, task: str, split: Split) -> Reader:
        if (task, split) not in self._readers:
            index = self._indices[task]
            source = index.train_source if split == "train" else index.test_source
            if source is None:
                raise DataError(f"task {task!r} has no {split} split; declare one in its sources.")
            self._readers[task, split] = Reader(source, self._cached_groups)
        return self._readers[task, split]
