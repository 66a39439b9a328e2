"""The loop in one plain process, with an engine of a few lines of PyTorch."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.errors import TrainingError
from apprentice.recipe import Optimizer
from apprentice.train import loop
from apprentice.train.batch import MicroBatch, PackedRows
from apprentice.train.engine.collectives import Collectives
from apprentice.train.lane_position import LanePosition, WindowShape, start_of_lanes
from apprentice.train.loop import LoopCallback, LoopConfig, compute_validation_loss, train_loop
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.optimizer import adamw
from apprentice.train.state import Goal, State, StepOutcome
from tests.train.rows import packed_columns, packed_rows

OPTIMIZER = Optimizer(learning_rate=1e-3, warmup_steps=1)


class PlainEngine:
    def __init__(self, dropout: float = 0.0) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=500,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            attention_dropout=dropout,
        )
        self.model = SupervisedLoss(LlamaForCausalLM(config)).train()
        self.optimizer = adamw(dict(self.model.named_parameters()), OPTIMIZER)
        self.rates: list[float] = []

    def _nll(self, batch: MicroBatch) -> torch.Tensor:
        nll: torch.Tensor = self.model(batch)
        return nll

    def train_step(self, batches: Sequence[MicroBatch], scale: float, rate: float) -> StepOutcome:
        self.rates.append(rate)
        self.optimizer.zero_grad()
        total = 0.0
        for batch in batches:
            nll = self._nll(batch)
            (nll * scale).backward()
            total += nll.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return StepOutcome(total, float(norm))

    def validation_nll(self, batch: MicroBatch) -> float:
        with torch.no_grad():
            return self._nll(batch).item()


def stream(start: int = 0, rows: int = 4) -> Iterator[PackedRows]:
    while True:
        yield packed_rows(rows, first=start)
        start += rows


def config(steps: int = 5, micro: int = 2, every: int = 2, **goal: Any) -> LoopConfig:
    return LoopConfig(7, Goal(steps, **goal), OPTIMIZER, micro, every, WindowShape(1024))


class Recorder(LoopCallback):
    """Keeps what the loop tells it; `empty` are the windows without rows, `requests` and `finished` its answers step by step."""

    def __init__(
        self, loss: float | None = 3.0, empty: Sequence[int] = (), requests: Sequence[bool] = (), finished: Sequence[bool] = ()
    ) -> None:
        self.loss, self.empty = loss, empty
        self.requests, self.finished = iter(requests), iter(finished)
        self.records: list[dict[str, Any]] = []
        self.saves: list[tuple[int, float | None]] = []
        self.settled: list[int] = []
        self.windows: list[int] = []
        self.calls: list[str] = []

    def record(self, figures: dict[str, Any]) -> None:
        self.records.append(figures)
        self.calls.append(f"record({figures['step']})")

    def is_checkpoint_requested(self) -> bool:
        return next(self.requests, False)

    def validate(self, state: State) -> float | None:
        self.calls.append("validate")
        return self.loss

    def save(self, state: State) -> None:
        self.saves.append((state.step, state.validation_loss))
        self.calls.append(f"save({state.step})")

    def has_saved(self) -> bool:
        return next(self.finished, False)

    def settle_save(self) -> None:
        self.settled.append(self.records[-1]["step"])
        self.calls.append("settle_save")

    def empty_window_drops(self, window: int) -> dict[str, dict[str, int]] | None:
        self.windows.append(window)
        return {"sums": {"too_long": window + 1}} if window in self.empty else None


def run(
    engine: PlainEngine, batches: Iterator[PackedRows], state: State, loop_config: LoopConfig
) -> tuple[State, list[dict[str, Any]], list[int]]:
    callback = Recorder()
    end = train_loop(engine, batches, state, loop_config, callback, collectives=Collectives())
    return end, callback.records, [step for step, _ in callback.saves]


def test_the_callback_is_called_in_order() -> None:
    callback = Recorder(finished=[False, False, True, False, True])
    train_loop(PlainEngine(), stream(), State(), config(), callback, collectives=Collectives())
    described = loop.__doc__.split("are called so:")[1].split() if loop.__doc__ else []
    assert callback.calls == described


def test_five_steps() -> None:
    engine = PlainEngine()
    end, records, saves = run(engine, stream(), State(), config())
    rows = packed_rows(20)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert {record["steps"] for record in records} == {5}
    assert saves == [2, 4, 5]
    assert (end.step, end.lanes[0][:2]) == (5, (0, 20))
    assert (end.tokens, end.target_tokens) == (rows.tokens, rows.targets)
    assert [ids for record in records for ids in record["examples"]] == [ids for fact in rows.facts for ids in fact.examples]
    assert end.validation_loss == 3.0
    assert sum(end.ledger.examples.values()) == sum(len(fact.examples) for fact in rows.facts)
    assert records[-1]["loss"] < records[0]["loss"] < 7.0
    assert engine.rates == pytest.approx([1e-3 * factor for factor in (1.0, 1.0, 0.853553, 0.5, 0.146447)], rel=1e-5)
    assert {"loss", "learning_rate", "grad_norm", "tokens_per_s", "data_wait", "eta_s", "seconds"} <= records[0].keys()
    assert records[-1]["eta_s"] == 0.0


def test_accumulation_does_not_change_the_loss() -> None:
    losses = [[record["loss"] for record in run(PlainEngine(), stream(), State(), config(micro=micro))[1]] for micro in (1, 2, 4)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0] == pytest.approx(losses[2], rel=1e-5)


def test_tokens_end_the_run_with_the_step_that_crosses() -> None:
    tokens = packed_rows(8).tokens
    end, records, saves = run(PlainEngine(), stream(), State(), config(steps=9, every=50, tokens=tokens + 1))
    assert (end.step, len(records), saves) == (3, 3, [3])
    assert run(PlainEngine(), stream(), State(), config(steps=9, tokens=tokens))[0].step == 2


def test_positions_count_all_of_finished_windows() -> None:
    first, second = PackedRows.from_columns(packed_columns(4)), joined(packed_columns(2, first=4), packed_columns(2, window=1))
    end, _, _ = run(PlainEngine(), iter([first, second]), State(), config(steps=2))
    in_second_window = sum(len(fact.examples) for fact in second.facts[2:])
    assert (end.lanes[0][:2], end.positions) == ((1, 2), 1024 + in_second_window)


def test_going_on_with_dropout_is_as_if_uninterrupted() -> None:
    constant = Optimizer(learning_rate=1e-3, schedule="constant")
    whole = run(PlainEngine(dropout=0.2), stream(), State(), replace(config(), optimizer=constant))[1]
    engine = PlainEngine(dropout=0.2)
    state, before, _ = run(engine, stream(), State(), replace(config(steps=2), optimizer=constant))
    torch.rand(100)  # whatever happened in between
    rest = run(engine, stream(start=state.lanes[0].row), state, replace(config(), optimizer=constant))[1]
    assert (len(before), len(rest)) == (2, 3)
    assert [record["loss"] for record in before + rest] == [record["loss"] for record in whole]


def joined(*parts: dict[str, Any], window_rows: int | None = None) -> PackedRows:
    """The rows of one step; with `window_rows`, of windows with so many."""
    columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    counts = {} if window_rows is None else {"window_rows": [window_rows] * len(columns["row"])}
    return PackedRows.from_columns(columns | counts)


def test_a_stream_that_begins_elsewhere_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"step 3: the stream is at \(window, row\) \(0, 4\) where \(0, 8\) comes next"):
        run(PlainEngine(), stream(start=4), State(step=2, lanes=(LanePosition(row=8),)), config())


def test_the_end_of_a_window_goes_on_in_the_next() -> None:
    rows = joined(packed_columns(4, window=3))
    of_an_earlier_version = State(step=4, lanes=(LanePosition(2, 9),))
    end, _, _ = run(PlainEngine(), iter([rows]), of_an_earlier_version, config(steps=5))
    assert end.lanes[0][:2] == (3, 4)


WRONG = {
    "a row is left out": (joined(packed_columns(2), packed_columns(2, first=3)), (0, 3)),
    "a row comes twice": (joined(packed_columns(2), packed_columns(2, first=1)), (0, 1)),
    "a window is not finished": (joined(packed_columns(2), packed_columns(2, window=1), window_rows=9), (1, 0)),
    "a window is left out": (joined(packed_columns(2), packed_columns(2, window=2), window_rows=2), (2, 0)),
    "a window begins in its middle": (joined(packed_columns(2), packed_columns(2, window=1, first=1), window_rows=2), (1, 1)),
}


@pytest.mark.parametrize("before", [0, 4])  # rows: in the first step of this process, or in a later one
@pytest.mark.parametrize(("rows", "place"), WRONG.values(), ids=WRONG.keys())
def test_every_steps_place_is_checked(rows: PackedRows, place: tuple[int, int], before: int) -> None:
    window, row = place
    shifted = replace(rows, facts=[fact._replace(row=fact.row + before * (fact.window == 0)) for fact in rows.facts])
    at = (window, row + before * (window == 0))
    words = f"step {1 + (before > 0)}: the stream is at (window, row) {at} where {(0, 2 + before)} comes next"
    with pytest.raises(TrainingError, match=re.escape(words)):
        run(PlainEngine(), iter([packed_rows(4)] * (before > 0) + [shifted]), State(), config())


def test_windows_without_rows_are_passed_over() -> None:
    callback = Recorder(empty=(0, 2, 3))
    steps = [joined(packed_columns(4, window=1), window_rows=4), joined(packed_columns(4, window=4), window_rows=4)]
    end = train_loop(PlainEngine(), iter(steps), State(), config(steps=2), callback, collectives=Collectives())
    assert (end.lanes[0][:3], callback.windows) == ((4, 4, 4), [0, 2, 3])
    assert end.ledger.dropped == {"sums": {"too_long": 1 + 3 + 4}}


def test_examples_are_of_their_rows_window() -> None:
    columns = packed_columns(4)
    columns["window"] = [3] * 4
    with pytest.raises(TrainingError, match="row 0 of window 3 holds the plan's position 0, which is of window 0"):
        run(PlainEngine(), iter([PackedRows.from_columns(columns)]), State(lanes=(LanePosition(3),)), config())


def test_a_stream_that_ends_early() -> None:
    with pytest.raises(TrainingError, match="ended after step 2"):
        run(PlainEngine(), iter([packed_rows(4), packed_rows(4, first=4)]), State(), config())


def test_a_loss_that_is_no_number_stops_with_step_and_examples() -> None:
    engine = PlainEngine()
    callback = Recorder()

    class BrokenEngine(PlainEngine):
        def train_step(self, batches: Sequence[MicroBatch], scale: float, rate: float) -> StepOutcome:
            outcome = engine.train_step(batches, scale, rate)
            return StepOutcome(math.nan, outcome.grad_norm) if len(engine.rates) == 2 else outcome

    with pytest.raises(TrainingError, match=r"step 2: the loss or its gradient is not a number .* positions 40, 41"):
        train_loop(BrokenEngine(), stream(), State(), config(every=1), callback, collectives=Collectives())
    assert [record["step"] for record in callback.records] == [1, 2]
    assert callback.saves == [(1, 3.0)]  # a broken model is not saved


def test_validation_loss() -> None:
    engine = PlainEngine()
    rows = packed_rows(5)
    expected = sum(engine.validation_nll(micro) for micro in rows.micro_batches(1)) / rows.targets
    assert compute_validation_loss(engine, rows, 2, Collectives()) == pytest.approx(expected, rel=1e-6)
    assert compute_validation_loss(engine, rows.share(5, 6), 2, Collectives()) is None


def test_a_requested_checkpoint_comes_at_once_and_without_validation() -> None:
    callback = Recorder(requests=[False, False, True, False, False])
    train_loop(PlainEngine(), stream(), State(), config(every=4), callback, collectives=Collectives())
    assert callback.saves == [(3, None), (4, 3.0), (5, 3.0)]


def test_a_save_is_settled_at_the_next_step_after_it_was_written() -> None:
    callback = Recorder(finished=[False, False, True, False, True])
    train_loop(PlainEngine(), stream(), State(), config(every=4), callback, collectives=Collectives())
    assert callback.settled == [3, 5]


def lane_stream(*starts: int, rows: int = 2) -> Iterator[PackedRows]:
    """Steps of `rows` rows of each lane: of window 0 and of window 1, from `starts` on."""
    places = list(starts)
    while True:
        yield joined(*(packed_columns(rows, first=start, window=lane) for lane, start in enumerate(places)))
        places = [start + rows for start in places]


def test_two_lanes_go_on_where_each_of_them_was() -> None:
    of_two = replace(config(), window=WindowShape(1024, lanes=2), optimizer=OPTIMIZER.model_copy(update={"schedule": "constant"}))
    whole = run(PlainEngine(), lane_stream(0, 0), State(lanes=start_of_lanes(2)), of_two)[1]
    engine = PlainEngine()
    state, before, _ = run(engine, lane_stream(0, 0), State(lanes=start_of_lanes(2)), replace(of_two, goal=Goal(2)))
    assert [place[:2] for place in state.lanes] == [(0, 4), (1, 4)]
    taken_up = State.from_json(json.loads(json.dumps(state.to_json())))
    rest = run(engine, lane_stream(*(place.row for place in taken_up.lanes)), taken_up, of_two)[1]
    assert [record["examples"] for record in before + rest] == [record["examples"] for record in whole]
    assert [record["loss"] for record in before + rest] == [record["loss"] for record in whole]
    assert whole[0]["examples"][0] < 1024 <= whole[0]["examples"][4]  # rows of the lanes in turn
    with pytest.raises(TrainingError, match=r"step 3: the stream is at \(window, row\) \(1, 2\) where \(1, 4\) comes next"):
        run(engine, lane_stream(4, 2), State(step=2, lanes=state.lanes), of_two)
