"""Many more clients than the endpoint takes: the code of benchmarks/serving/load.py for a short time."""

from __future__ import annotations

import pytest

from apprentice.serve.deployment import Endpoint
from benchmarks.serving import load
from tests.serve.conftest import QUEUED, RUNNING

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]


async def test_nothing_but_429_and_whatever_is_accepted_is_answered(endpoint: Endpoint) -> None:
    outcome = await load.load(endpoint.url, clients=200, seconds=15.0)
    assert outcome.failed == {}
    assert outcome.accepted == outcome.ended[load.WHOLE] > RUNNING + QUEUED
    assert outcome.ended[load.REFUSED] > 0
    assert min(outcome.memory) > 0
