"""Many more clients than the endpoint takes: the code of benchmarks/load.py for a short time."""

from __future__ import annotations

import pytest

from apprentice.serve.deployment import Endpoint
from tests.serve.conftest import QUEUED, RUNNING
from tests.test_claims import script

pytestmark = [pytest.mark.slow, pytest.mark.asyncio]


async def test_nothing_but_429_and_whatever_is_accepted_is_answered(endpoint: Endpoint) -> None:
    load = script("load")
    outcome = await load.load(endpoint.url, clients=200, seconds=15.0)
    assert outcome.failed == {}
    assert outcome.accepted == outcome.ended[load.WHOLE] > RUNNING + QUEUED
    assert outcome.ended[load.REFUSED] > 0
    assert min(outcome.memory) > 0
