"""Several machines, really: the pipeline on three hosts, and a few of the faults of `python -m tests.cluster.faults`."""

from __future__ import annotations

import pytest

from tests.cluster import faults


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("name", ["none", "killed"])
def test_a_run_on_three_hosts_outlives(name, tiny_model, tmp_path):
    fault = faults.FAULTS[name]
    line = faults.play(fault, tiny_model, tmp_path)
    assert line.startswith(f"| {fault.what} | "), line
