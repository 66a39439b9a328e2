"""A single reply's tokens are sent one by one; the more requests run, the longer a group is collected, up to a limit."""

from __future__ import annotations

import pytest

from apprentice.inference.token_pacing import pacing_seconds


@pytest.mark.parametrize(("running", "seconds"), [(1, 0.0), (2, 0.003), (11, 0.03), (34, 0.099), (35, 0.1), (500, 0.1)])
def test_groups_are_longer_under_load_up_to_a_limit(running: int, seconds: float) -> None:
    assert pacing_seconds(running) == pytest.approx(seconds)
