"""The sampling plan: a pure function from a position in training to task, format, template, row and exemplars.

    position ──WeightedInterleave──▶ task, and count: how often the task was drawn before
    position ──key──▶ format (zero_shot, few_shot, inverted, cot) ──key──▶ template of the task that this format may use
    task, count ──RowOrder──▶ pass = count // rows of the task, and the row at place count % rows in that pass's order
    task, row ──ExemplarPool──▶ exemplars, if the format is few_shot

With seed 7, a task `qa` of 4 rows and weight 3 and a task `nli` of 2 rows and weight 1, the first positions are:

    position    0          1          2          3          4          5          6          7
    task        qa         nli        qa         qa         qa         nli        qa         qa
    count       0          0          1          2          3          1          4          5
    pass, row   0, 0       0, 0       0, 1       0, 3       0, 2       0, 1       1, 2       1, 1
    format      zero_shot  few_shot   zero_shot  zero_shot  zero_shot  zero_shot  zero_shot  zero_shot

Each pass has every row once, in an order of its own. Nothing has state: any range of positions can be computed alone, at the same
cost wherever it lies and however large the datasets are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from apprentice.data.index.build import is_held_out
from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sampling.exemplars import ExemplarPool, exclude_own_row, exemplar_places, exemplar_rows
from apprentice.data.sampling.interleave import WeightedInterleave
from apprentice.data.sampling.mixture import Size, shares
from apprentice.data.sampling.permutation import Numbers, below, draw, key_of, permute
from apprentice.data.sampling.shuffle import RowOrder, draw_rows, group_equal
from apprentice.recipe import Formats, Recipe
from apprentice.tasks.schema import Task, Template

__all__ = ["FORMATS", "Draw", "Plan", "exemplar_rows"]

FORMATS = ("zero_shot", "few_shot", "inverted", "cot")
_ZERO_SHOT, _FEW_SHOT, _INVERTED, _COT = range(4)


class Draw(NamedTuple):
    """One position of the plan: an example before it is rendered."""

    position: int
    task: str
    format: str  # one of FORMATS
    template: str
    row: int  # number in the task's training source
    shots: tuple[int, ...]  # source row numbers of the exemplars, nearest to the instruction's start first
    pass_: int  # number of complete passes over the task's rows before this draw


class _TrainedTask(NamedTuple):
    """One task that is trained on, with its template names by kind."""

    name: str
    scored: tuple[str, ...]  # templates
    inverted: tuple[str, ...]
    cot: tuple[str, ...]
    order: RowOrder

    @property
    def by_format(self) -> tuple[tuple[str, ...], ...]:
        """The templates that each of FORMATS may use, in that order."""
        return (self.scored, self.scored, self.inverted, self.cot)


class Plan:
    """The sampling plan of a run; made by `Plan.of`. Picklable."""

    def __init__(
        self, seed: int, formats: Formats, shots: tuple[int, int], trained_tasks: Sequence[_TrainedTask], weights: Sequence[int]
    ):
        self._state = (seed, formats, shots, tuple(trained_tasks), tuple(weights))
        self._shots = shots
        self._format_key, self._template_key, self._shots_key = (key_of(seed, name) for name in ("format", "template", "shots"))
        self._trained_tasks = tuple(trained_tasks)
        self._leaf = {trained_task.name: leaf for leaf, trained_task in enumerate(trained_tasks)}
        self._interleave = WeightedInterleave(weights)
        self._orders = [trained_task.order for trained_task in trained_tasks]
        self._pools = [ExemplarPool(seed, trained_task.name, trained_task.order.kept) for trained_task in trained_tasks]
        self._pool_sizes = np.array([len(pool) for pool in self._pools])
        # (tasks, formats): number of templates that each format may use.
        self._templates = np.array([[len(names) for names in trained_task.by_format] for trained_task in trained_tasks])
        last = round(formats.cot * 2**53)
        self._bounds = (round(formats.zero_shot * 2**53), 2**53 - round(formats.inverted * 2**53) - last, 2**53 - last)

    def __reduce__(self) -> tuple[type[Plan], tuple[int, Formats, tuple[int, int], tuple[_TrainedTask, ...], tuple[int, ...]]]:
        return type(self), self._state

    @classmethod
    def of(cls, recipe: Recipe, tasks: Sequence[Task], indices: Mapping[str, TaskIndex]) -> Plan:
        """The plan over all tasks that are not held out and have training rows; the order of `tasks` does not matter.

        Raises `RecipeError` if there are no such tasks, or as `mixture.shares` does.
        """
        by_name = {task.name: task for task in tasks}
        trained = {name: task for name, task in sorted(by_name.items()) if not is_held_out(task, recipe.data.hold_out)}
        sizes = {
            name: Size(len(indices[name].train), task.cluster, indices[name].mean_target_tokens) for name, task in trained.items()
        }
        weights = shares(recipe.data.mixture, sizes)
        trained_tasks = []
        for name in weights:
            source = indices[name].train_source
            groups = np.array(source.group_rows if source else (), dtype=np.int64)
            order = RowOrder(key_of(recipe.seed, name, "order"), indices[name].train, groups)
            task = trained[name]
            kinds = (task.scored_templates, task.inverted_templates, task.cot_templates)
            scored, inverted, cot = (_choose_templates(kind, recipe, name) for kind in kinds)
            trained_tasks.append(_TrainedTask(name, scored, inverted, cot, order))
        return cls(recipe.seed, recipe.data.formats, recipe.data.shots, trained_tasks, list(weights.values()))

    @property
    def tasks(self) -> tuple[str, ...]:
        """Names of the tasks trained on, sorted."""
        return tuple(trained_task.name for trained_task in self._trained_tasks)

    @property
    def shares(self) -> dict[str, Fraction]:
        """Task → its exact share of the positions."""
        total = sum(self._interleave.weights)
        return {name: Fraction(weight, total) for name, weight in zip(self.tasks, self._interleave.weights, strict=True)}

    def task_at(self, position: int) -> str:
        """Name of the task at a position."""
        return self._trained_tasks[int(self._interleave.assign(np.array([position]))[0][0])].name

    def count(self, task: str, position: int) -> int:
        """Number of positions before `position` that go to `task`: closed form, within 2 of position × share."""
        return self._interleave.count(self._leaf[task], position)

    def draws(self, start: int, stop: int) -> list[Draw]:
        """The draws at positions [start, stop)."""
        positions = np.arange(start, stop, dtype=np.int64)
        if not positions.size:
            return []
        leaves, counts = self._interleave.assign(positions)
        formats = self._formats(positions, leaves)
        template_counts = self._templates[leaves, formats]
        templates = below(draw(self._template_key, positions), template_counts).tolist()
        rows, passes = draw_rows(self._orders, leaves, counts)
        shots = self._exemplars(positions, leaves, formats, rows)
        columns = zip(positions.tolist(), leaves.tolist(), formats.tolist(), templates, rows.tolist(), passes.tolist(), strict=True)
        draws = []
        for position, leaf, form, template, row, pass_ in columns:
            trained_task = self._trained_tasks[leaf]
            names = trained_task.by_format[form]
            draws.append(Draw(position, trained_task.name, FORMATS[form], names[template], row, shots.get(position, ()), pass_))
        return draws

    def _formats(self, positions: Numbers, leaves: Numbers) -> Numbers:
        """Formats as indices into FORMATS: the drawn one if the task supports it, else zero-shot, else inverted."""
        chance = (draw(self._format_key, positions) >> np.uint64(11)).astype(np.int64)
        formats = sum(((chance >= bound).astype(np.int64) for bound in self._bounds), np.zeros_like(chance))
        too_few = (formats == _FEW_SHOT) & (self._pool_sizes[leaves] <= self._shots[1])
        formats[too_few | (self._templates[leaves, formats] == 0)] = _ZERO_SHOT
        formats[self._templates[leaves, formats] == 0] = _INVERTED
        return formats

    def _exemplars(self, positions: Numbers, leaves: Numbers, formats: Numbers, rows: Numbers) -> dict[int, tuple[int, ...]]:
        """Position → source rows of its exemplars, for the few-shot positions."""
        few = np.flatnonzero(formats == _FEW_SHOT)
        if not few.size:
            return {}
        least, most = self._shots
        counts = least + below(draw(self._shots_key, positions[few]), most - least + 1)
        by_pool, parts = group_equal(leaves[few])
        few, counts = few[by_pool], counts[by_pool]
        keys = np.empty(len(few), dtype=np.uint64)
        for leaf, part in parts:
            keys[part] = self._pools[leaf].key
        places = exemplar_places(self._pool_sizes[leaves[few]], draw(keys, rows[few]), most + 1)
        for leaf, part in parts:
            places[part] = self._pools[leaf].rows[places[part]]
        return dict(zip(positions[few].tolist(), exclude_own_row(rows[few], places, counts), strict=True))


def _choose_templates(templates: Sequence[Template], recipe: Recipe, task: str) -> tuple[str, ...]:
    """Names of the templates that training uses: all, or `data.templates_per_task` of them chosen by key, in the file's order."""
    most = min(recipe.data.templates_per_task or len(templates), len(templates))
    chosen = permute(np.arange(most), max(len(templates), 1), key_of(recipe.seed, task, "templates"))
    return tuple(templates[number].name for number in sorted(chosen.tolist()))
