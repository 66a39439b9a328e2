"""Several machines, really: the pipeline on three hosts, one of which is killed; more by `python -m tests.cluster.faults`."""

from __future__ import annotations

import pytest

from tests.cluster import faults


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_on_three_hosts_outlives_one_of_them(tiny_model, tmp_path):
    fault = faults.FAULTS["killed"]
    line = faults.play(fault, tiny_model, tmp_path)
    assert line.startswith(f"| {fault.what} | "), line


def test_the_table_of_the_documents_is_the_harness_own():
    """A line for each fault, in the harness's order, and none of another."""
    lines = faults.lines_of(faults.TABLE.read_text(encoding="utf-8"))
    assert list(lines) == [fault.what for fault in faults.FAULTS.values()]
