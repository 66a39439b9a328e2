"""The loop in one plain process, with an engine of a few lines of PyTorch."""

from __future__ import annotations

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
from apprentice.train.batch import Micro, PackedRows
from apprentice.train.engine.collectives import Collectives
from apprentice.train.loop import LoopConfig, train_loop, validation_loss
from apprentice.train.losses.sft import TargetLoss
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
        self.model = TargetLoss(LlamaForCausalLM(config)).train()
        self.optimizer = adamw(dict(self.model.named_parameters()), OPTIMIZER)
        self.rates: list[float] = []

    def _nll(self, micro: Micro) -> torch.Tensor:
        nll: torch.Tensor = self.model(micro.input_ids, micro.positions, micro.is_target)
        return nll

    def train_step(self, micros: Sequence[Micro], scale: float, rate: float) -> StepOutcome:
        self.rates.append(rate)
        self.optimizer.zero_grad()
        total = 0.0
        for micro in micros:
            nll = self._nll(micro)
            (nll * scale).backward()
            total += nll.item()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()
        return StepOutcome(total, float(norm))

    def validation_nll(self, micro: Micro) -> float:
        with torch.no_grad():
            return self._nll(micro).item()


def stream(start: int = 0, rows: int = 4) -> Iterator[PackedRows]:
    while True:
        yield packed_rows(rows, first=start)
        start += rows


def config(steps: int = 5, micro: int = 2, every: int = 2, **goal: Any) -> LoopConfig:
    return LoopConfig(7, Goal(steps, **goal), OPTIMIZER, micro, every, window=1024)


def run(
    engine: PlainEngine, batches: Iterator[PackedRows], state: State, loop_config: LoopConfig
) -> tuple[State, list[dict[str, Any]], list[int]]:
    records: list[dict[str, Any]] = []
    saves: list[int] = []
    end = train_loop(
        engine,
        batches,
        state,
        loop_config,
        collectives=Collectives(),
        record=records.append,
        save=lambda now: saves.append(now.step),
        validate=lambda: 3.0,
    )
    return end, records, saves


def test_five_steps() -> None:
    engine = PlainEngine()
    end, records, saves = run(engine, stream(), State(), config())
    rows = packed_rows(20)
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5]
    assert {record["steps"] for record in records} == {5}
    assert saves == [2, 4, 5]
    assert (end.step, end.window, end.row) == (5, 0, 20)
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
    first, second = PackedRows.of(packed_columns(4)), joined(packed_columns(2, first=4), packed_columns(2, window=1))
    end, _, _ = run(PlainEngine(), iter([first, second]), State(), config(steps=2))
    in_second_window = sum(len(fact.examples) for fact in second.facts[2:])
    assert (end.window, end.row, end.positions) == (1, 2, 1024 + in_second_window)


def test_going_on_with_dropout_is_as_if_uninterrupted() -> None:
    constant = Optimizer(learning_rate=1e-3, schedule="constant")
    whole = run(PlainEngine(dropout=0.2), stream(), State(), replace(config(), optimizer=constant))[1]
    engine = PlainEngine(dropout=0.2)
    state, before, _ = run(engine, stream(), State(), replace(config(steps=2), optimizer=constant))
    torch.rand(100)  # whatever happened in between
    rest = run(engine, stream(start=state.row), state, replace(config(), optimizer=constant))[1]
    assert (len(before), len(rest)) == (2, 3)
    assert [record["loss"] for record in before + rest] == [record["loss"] for record in whole]


def joined(*parts: dict[str, Any], window_rows: int | None = None) -> PackedRows:
    """The rows of one step; with `window_rows`, of windows with so many."""
    columns = {name: [value for part in parts for value in part[name]] for name in parts[0]}
    counts = {} if window_rows is None else {"window_rows": [window_rows] * len(columns["row"])}
    return PackedRows.of(columns | counts)


def test_a_stream_that_begins_elsewhere_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"step 3: the stream is at \(window, row\) \(0, 4\) where \(0, 8\) comes next"):
        run(PlainEngine(), stream(start=4), State(step=2, row=8), config())


def test_the_end_of_a_window_goes_on_in_the_next() -> None:
    rows = joined(packed_columns(4, window=3))
    end, _, _ = run(PlainEngine(), iter([rows]), State(step=4, window=2, row=9), config(steps=5))  # of an earlier version
    assert (end.window, end.row) == (3, 4)


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
    asked: list[int] = []

    def is_empty(window: int) -> bool:
        asked.append(window)
        return window in (0, 2, 3)

    steps = [joined(packed_columns(4, window=1), window_rows=4), joined(packed_columns(4, window=4), window_rows=4)]
    more: dict[str, Any] = {"record": lambda _: None, "save": lambda _: None, "validate": lambda: None}
    end = train_loop(PlainEngine(), iter(steps), State(), config(steps=2), collectives=Collectives(), is_empty=is_empty, **more)
    assert (end.window, end.row, end.window_rows, asked) == (4, 4, 4, [0, 2, 3])


def test_examples_are_of_their_rows_window() -> None:
    columns = packed_columns(4)
    columns["window"] = [3] * 4
    with pytest.raises(TrainingError, match="row 0 of window 3 holds the plan's position 0, which is of window 0"):
        run(PlainEngine(), iter([PackedRows.of(columns)]), State(window=3), config())


def test_a_stream_that_ends_early() -> None:
    with pytest.raises(TrainingError, match="ended after step 2"):
        run(PlainEngine(), iter([packed_rows(4), packed_rows(4, first=4)]), State(), config())


def test_a_loss_that_is_no_number_stops_with_step_and_examples() -> None:
    engine = PlainEngine()
    records: list[dict[str, Any]] = []

    class Broken(PlainEngine):
        def train_step(self, micros: Sequence[Micro], scale: float, rate: float) -> StepOutcome:
            outcome = engine.train_step(micros, scale, rate)
            return StepOutcome(math.nan, outcome.grad_norm) if len(engine.rates) == 2 else outcome

    with pytest.raises(TrainingError, match=r"step 2: the loss or its gradient is not a number .* positions 40, 41"):
        train_loop(
            Broken(),
            stream(),
            State(),
            config(),
            collectives=Collectives(),
            record=records.append,
            save=lambda _: pytest.fail("a broken model must not be saved"),
            validate=lambda: None,
        )
    assert [record["step"] for record in records] == [1, 2]


def test_validation_loss() -> None:
    engine = PlainEngine()
    rows = packed_rows(5)
    expected = sum(engine.validation_nll(micro) for micro in rows.micros(1)) / rows.targets
    assert validation_loss(engine, rows, 2, Collectives()) == pytest.approx(expected, rel=1e-6)
    assert validation_loss(engine, rows.share(5, 6), 2, Collectives()) is None


def test_a_checkpoint_that_is_wanted_comes_at_once_and_without_validation() -> None:
    saves: list[tuple[int, float | None]] = []
    wishes = iter([False, False, True, False, False])
    train_loop(
        PlainEngine(),
        stream(),
        State(),
        config(every=4),
        collectives=Collectives(),
        record=lambda _: None,
        save=lambda now: saves.append((now.step, now.validation_loss)),
        validate=lambda: 3.0,
        wanted=lambda: next(wishes),
    )
    assert saves == [(3, None), (4, 3.0), (5, 3.0)]


def test_a_checkpoint_is_made_known_at_the_next_step_after_it_was_written() -> None:
    settled: list[int] = []
    steps: list[int] = []
    flags = iter([False, False, True, False, True])
    train_loop(
        PlainEngine(),
        stream(),
        State(),
        config(every=4),
        collectives=Collectives(),
        record=lambda record: steps.append(record["step"]),
        save=lambda now: None,
        written=lambda: next(flags),
        settle=lambda: settled.append(steps[-1]),
        validate=lambda: 3.0,
    )
    assert settled == [3, 5]
