"""Arithmetic of `benchmarks/data/plan_scale.py`: messages of a step and the splitter of many workers, by worked examples."""

from __future__ import annotations

import pytest

from benchmarks.data import plan_scale


def test_a_step_lasts_as_long_as_its_arithmetic_or_its_blocks():
    assert plan_scale.simulate(8, 1.0, 0.01) == pytest.approx(1.0)  # 80 ms of blocks hide behind a second
    assert plan_scale.simulate(100, 1.0, 0.01) == pytest.approx(1.0)
    assert plan_scale.simulate(512, 1.0, 0.01) == pytest.approx(5.12)
    assert plan_scale.simulate(100, 0.1, 0.01) == pytest.approx(1.0)


def test_lanes_hand_out_blocks_side_by_side():
    assert plan_scale.simulate(4096, 1.0, 0.008) == pytest.approx(32.768)
    assert plan_scale.simulate(4096, 1.0, 0.008, lanes=16) == pytest.approx(2.048)
    assert plan_scale.simulate(4096, 1.0, 0.008, lanes=64) == pytest.approx(1.0)  # 64 blocks of a lane take half a second
    assert plan_scale.simulate(100, 0.1, 0.01, lanes=4) == pytest.approx(0.25)


def test_few_lanes_keep_thousands_of_workers_from_waiting():
    """With times of blocks that vary, and the slowest lane of each step counting."""
    assert plan_scale.wait_share(4096, 1.0, 0.008, 1) == pytest.approx(1 - 1 / 32.768, abs=1e-3)
    assert plan_scale.wait_share(4096, 1.0, 0.008, 32) > 0.02
    assert 0 <= plan_scale.wait_share(4096, 1.0, 0.008, 64) < 0.02
    assert plan_scale.fewest_lanes(4096, 1.0, 0.008) == 64
    assert plan_scale.fewest_lanes(512, 1.0, 0.008) == 8
    assert plan_scale.fewest_lanes(64, 1.0, 0.008) == 1


def test_messages_of_a_step():
    sent = plan_scale.messages(64, 2.0, 32)  # 64 blocks, 1 record, 64 reports every 32 steps, 64 polls every 2 s
    assert (sent.blocks, sent.records, sent.reports, sent.polls, sent.total) == (64, 1, 2, 64, 131)


def test_rows_that_hide_the_splitter():
    assert plan_scale.rows_that_hide(512, 0.01, 0.2) == 26  # 5.12 s of blocks, 0.2 s a row
    assert plan_scale.simulate(512, 26 * 0.2, 0.01) == pytest.approx(26 * 0.2)
    assert plan_scale.rows_that_hide(8, 0.01, 0.2) == 1


def test_the_table_names_the_first_bottleneck_and_the_change():
    lines = plan_scale.scale_table(15.0, 3.0, 0.01).splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:6]]
    assert [row[0] for row in rows] == ["8", "64", "512", "4,096"]
    assert [row[3] for row in rows] == ["1.00 s", "1.00 s", "5.12 s", "40.96 s"]
    assert [row[6] for row in rows] == ["nothing", "nothing", "the splitter", "the splitter"]
    assert rows[2][7] == "`data.lanes: 8`, or `training.global_batch: 12,800` or more (25 rows of each worker)"
    assert "7B, full 84.0 GB (84 s)" in lines[-1]
