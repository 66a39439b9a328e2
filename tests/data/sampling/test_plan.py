"""The plan: a pure function whose counts are closed form, whatever stretch is asked for."""

from __future__ import annotations

import pickle
import re
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from apprentice.data.index.task_index import TaskIndex
from apprentice.data.sampling import plan as plan_module
from apprentice.data.sampling.permutation import key_of
from apprentice.data.sampling.plan import Draw, Plan, _TrainedTask, exemplar_rows
from apprentice.data.sampling.shuffle import RowOrder
from apprentice.data.sources.locate import Source
from apprentice.errors import RecipeError
from apprentice.recipe import Formats, Recipe
from apprentice.tasks.schema import Task

MIXED = {"zero_shot": 0.6, "few_shot": 0.3, "inverted": 0.1}


def make_task(name: str, scored: int = 3, inverted: int = 1, cluster: str = "c") -> Task:
    plain = [{"name": f"t{number}", "instruction": "Do."} for number in range(scored)]
    turned = [{"name": f"i{number}", "instruction": "Do.", "inverted": True} for number in range(inverted)]
    sources = [{"dataset": name}]
    return Task.model_validate(
        {"name": name, "cluster": cluster, "sources": sources, "answer": "{{ a }}", "metrics": ["exact_match"]}
        | {"templates": plain + turned}
    )


def make_index(name: str, rows: int, group: int = 100) -> TaskIndex:
    """All source rows but every tenth are kept."""
    groups = (group,) * (rows // group) + ((rows % group,) if rows % group else ())
    source = Source(name, "train", ("f",), (len(groups),), groups, {}, "x")
    kept = np.array([row for row in range(rows) if row % 10 != 9], dtype=np.int64)
    none = np.array([], dtype=np.int64)
    return TaskIndex(name, source, None, kept, none, none, 10.0, 2.0, {})


def make_plan(sizes: dict[str, int], tasks: list[Task] | None = None, seed: int = 7, **data: Any) -> Plan:
    tasks = tasks or [make_task(name) for name in sizes]
    values = {"tasks": list(sizes), "formats": MIXED, "shots": [1, 3]} | data
    content = {"name": "n", "seed": seed, "model": {"base": "b"}, "data": values, "training": {"steps": 1}}
    return Plan.of(Recipe.model_validate(content), tasks, {name: make_index(name, rows) for name, rows in sizes.items()})


SIZES = {"small": 30, "middle": 500, "large": 4000}


def test_the_plan_stays_what_it_is() -> None:
    """A run that goes on with a newer version must draw what it drew before; if this changes, runs must be refused."""
    plan = make_plan(SIZES, seed=17)
    assert plan.tasks == ("large", "middle", "small")
    assert plan.shares == {"large": Fraction(400, 453), "middle": Fraction(50, 453), "small": Fraction(3, 453)}
    assert [tuple(draw) for draw in plan.draws(1000, 1004)] == [
        (1000, "large", "zero_shot", "t1", 1373, (), 0),
        (1001, "large", "zero_shot", "t0", 3515, (), 0),
        (1002, "large", "few_shot", "t0", 1300, (2314, 414), 0),
        (1003, "large", "zero_shot", "t2", 614, (), 0),
    ]
    assert plan.draws(10**12, 10**12 + 1) == [Draw(10**12, "middle", "inverted", "i0", 194, (), 245278390)]


@settings(deadline=None)
@given(start=st.integers(0, 10**12), stop=st.integers(0, 600), cut=st.integers(0, 600))
def test_chunks_do_not_matter(start: int, stop: int, cut: int) -> None:
    plan = make_plan(SIZES)
    cut = min(cut, stop)
    assert plan.draws(start, start + stop) == plan.draws(start, start + cut) + plan.draws(start + cut, start + stop)


@settings(deadline=None)
@given(start=st.integers(0, 10**12))
def test_counts_and_passes_are_closed_form(start: int) -> None:
    plan = make_plan(SIZES)
    counts = {task: plan.count(task, start) for task in plan.tasks}
    for draw in plan.draws(start, start + 100):
        assert plan.task_at(draw.position) == draw.task
        assert draw.pass_ == counts[draw.task] // (SIZES[draw.task] * 9 // 10)
        counts[draw.task] += 1
    assert counts == {task: plan.count(task, start + 100) for task in plan.tasks}
    assert all(abs(count - (start + 100) * plan.shares[task]) <= 2 for task, count in counts.items())


def test_each_row_comes_once_per_pass() -> None:
    plan = make_plan(SIZES)
    draw_rows: dict[tuple[str, int], list[int]] = {}
    for draw in plan.draws(0, 12_000):
        draw_rows.setdefault((draw.task, draw.pass_), []).append(draw.row)
    complete = [(task, pass_) for task, pass_ in draw_rows if (task, pass_ + 1) in draw_rows]
    assert len(complete) >= 6
    for task, pass_ in complete:
        assert sorted(draw_rows[task, pass_]) == [row for row in range(SIZES[task]) if row % 10 != 9]
    assert draw_rows["large", 0] != draw_rows["large", 1]


def test_formats_templates_and_shots_are_as_asked() -> None:
    draws = make_plan(SIZES).draws(0, 20_000)
    formats = Counter(draw.format for draw in draws)
    assert [formats[name] / len(draws) for name in MIXED] == pytest.approx(list(MIXED.values()), abs=0.02)
    templates = Counter(draw.template for draw in draws if draw.format != "inverted")
    assert set(templates) == {"t0", "t1", "t2"}
    assert max(templates.values()) / min(templates.values()) < 1.1
    assert {draw.template for draw in draws if draw.format == "inverted"} == {"i0"}
    shots = Counter(len(draw.shots) for draw in draws if draw.format == "few_shot")
    assert set(shots) == {1, 2, 3}
    assert max(shots.values()) / min(shots.values()) < 1.15
    assert all(draw.shots == () for draw in draws if draw.format != "few_shot")


def test_reasoning_is_drawn_where_a_task_has_such_wordings() -> None:
    content = make_task("thinks").model_dump(mode="json")
    content["templates"].append({"name": "aloud", "instruction": "Think.", "cot": True})
    tasks = [Task.model_validate(content), make_task("plain")]
    rates = {"zero_shot": 0.5, "few_shot": 0.1, "inverted": 0.1, "cot": 0.3}
    draws = make_plan({"thinks": 500, "plain": 500}, tasks, formats=rates).draws(0, 10_000)
    formats = {name: Counter(draw.format for draw in draws if draw.task == name) for name in ("thinks", "plain")}
    assert [formats["thinks"][name] / formats["thinks"].total() for name in rates] == pytest.approx(list(rates.values()), abs=0.02)
    assert formats["plain"]["cot"] == 0
    assert formats["plain"]["zero_shot"] / formats["plain"].total() == pytest.approx(0.8, abs=0.02)
    assert {draw.template for draw in draws if draw.format == "cot"} == {"aloud"}
    assert "aloud" not in {draw.template for draw in draws if draw.format != "cot"}


def test_wordings_limited_on_purpose() -> None:
    """For ablations: those of one are among those of two, and tasks do not all take their first."""
    tasks = [make_task(f"task{number}", scored=8, inverted=2) for number in range(6)]
    used = []
    for most in (1, 2, 8, 20):
        draws = make_plan({task.name: 300 for task in tasks}, tasks, templates_per_task=most).draws(0, 20_000)
        used.append({task.name: {draw.template for draw in draws if draw.task == task.name} for task in tasks})
    assert [{len(names) for names in one.values()} for one in used] == [{2}, {4}, {10}, {10}]  # scored and inverted ones
    for few, more in pairwise(used):
        assert all(few[name] <= more[name] for name in few)
    assert len({frozenset(names) for names in used[0].values()}) > 2


def test_exemplars_are_those_that_evaluation_draws() -> None:
    plan = make_plan(SIZES)
    few = [draw for draw in plan.draws(0, 3000) if draw.shots]
    assert len(few) > 500
    for draw in few[:100]:
        kept = make_index(draw.task, SIZES[draw.task]).train
        assert draw.shots == exemplar_rows(7, draw.task, draw.row, len(draw.shots), kept)
        assert draw.row not in draw.shots


def test_what_a_task_cannot_do_becomes_zero_shot() -> None:
    tasks = [make_task("tiny"), make_task("straight", inverted=0), make_task("turned", scored=0)]
    plan = make_plan({"tiny": 3, "straight": 300, "turned": 300}, tasks, mixture={"strategy": "equal"})
    formats = {name: Counter(draw.format for draw in plan.draws(0, 3000) if draw.task == name) for name in plan.tasks}
    assert set(formats["tiny"]) == {"zero_shot", "inverted"}
    assert set(formats["straight"]) == {"zero_shot", "few_shot"}
    assert set(formats["turned"]) == {"inverted"}


def test_held_out_and_empty_tasks_have_no_positions() -> None:
    tasks = [make_task("a"), make_task("b", cluster="held"), make_task("c")]
    plan = make_plan({"a": 50, "b": 50, "c": 0}, tasks, hold_out=["held"])
    assert plan.tasks == ("a",)
    assert {draw.task for draw in plan.draws(0, 200)} == {"a"}
    with pytest.raises(RecipeError, match="no task has rows to train on"):
        make_plan({"a": 50, "b": 50, "c": 0}, tasks, hold_out=["held", "a"])


def test_the_order_of_tasks_does_not_matter_but_the_seed_does() -> None:
    forward, backward = make_plan(SIZES), make_plan(dict(reversed(SIZES.items())))
    assert forward.draws(0, 500) == backward.draws(0, 500)
    other = make_plan(SIZES, seed=8).draws(0, 500)
    assert [draw.row for draw in other] != [draw.row for draw in forward.draws(0, 500)]
    assert [draw.template for draw in other] != [draw.template for draw in forward.draws(0, 500)]


def test_a_pickled_plan_is_the_same_and_small() -> None:
    plan = make_plan(SIZES)
    plan.draws(0, 500)
    data = pickle.dumps(plan)
    assert len(data) < 8 * 0.9 * sum(SIZES.values()) + 10_000
    assert pickle.loads(data).draws(10**9, 10**9 + 500) == plan.draws(10**9, 10**9 + 500)


def test_a_window_reads_few_row_groups() -> None:
    plan = make_plan({"huge": 100_000, "other": 100_000}, formats={"zero_shot": 0.5, "few_shot": 0.5, "inverted": 0.0})
    for start in (0, 10**6, 10**12):
        draws = plan.draws(start, start + 1024)
        for task in plan.tasks:
            own = {draw.row // 100 for draw in draws if draw.task == task}
            shown = {shot // 100 for draw in draws if draw.task == task for shot in draw.shots}
            assert 8 <= len(own) <= 24
            assert 8 <= len(shown) <= 8 * 7  # stretches of 512 rows over row groups of 100


def test_no_positions() -> None:
    plan = make_plan(SIZES)
    assert plan.draws(5, 5) == []
    assert plan.draws(5, 6) == plan.draws(0, 6)[5:]


def test_the_first_positions_are_those_of_the_modules_docstring() -> None:
    trained_tasks = [
        _TrainedTask("qa", ("ask", "tell"), (), (), RowOrder(key_of(7, "qa", "order"), np.arange(4), np.array([4]))),
        _TrainedTask("nli", ("ask",), (), (), RowOrder(key_of(7, "nli", "order"), np.arange(2), np.array([2]))),
    ]
    plan = Plan(7, Formats(zero_shot=0.7, few_shot=0.3), (1, 1), trained_tasks, [3, 1])
    lines = {cells[0]: cells[1:] for line in str(plan_module.__doc__).splitlines() if (cells := re.split(r" {2,}", line.strip()))}
    draws = plan.draws(0, 8)
    assert [draw.task for draw in draws] == lines["task"]
    assert [draw.format for draw in draws] == lines["format"]
    assert [plan.count(draw.task, draw.position) for draw in draws] == [int(count) for count in lines["count"]]
    assert [f"{draw.pass_}, {draw.row}" for draw in draws] == lines["pass, row"]
