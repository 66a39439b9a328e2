"""The scaling policy: how many workers nodes have room for, and what it decides for a group that runs."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.train import ScalingConfig

from apprentice.errors import ResourcesError
from apprentice.train.distributed import elastic
from apprentice.train.distributed.compat import NoopDecision, ResizeDecision
from apprentice.train.distributed.elastic import DivisorPolicy
from apprentice.train.distributed.mailbox import Mailbox
from apprentice.train.distributed.resources import workers_that_fit
from tests.train.distributed.test_resources import recipe

RANGE: dict[str, Any] = {"workers": {"min": 2, "max": 8}, "global_batch": 16}


def test_the_example_is_true() -> None:
    table = re.findall(r"^ +(\d+) +(\d+) +\D.*? (\d+)$", elastic.__doc__ or "", re.MULTILINE)
    assert len(table) == 5
    for nodes, room, workers in table:
        cluster = [{"CPU": 4.0}] * int(nodes)
        assert max(4 * int(nodes) - 2, 0) == int(room)
        if int(workers) == 0:
            with pytest.raises(ResourcesError):
                workers_that_fit(recipe(**RANGE), cluster)
        else:
            assert workers_that_fit(recipe(**RANGE), cluster) == int(workers)


def test_a_group_grows_at_the_checkpoint_requested_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    mailbox = Mailbox(4)
    remote: Any = SimpleNamespace(
        **{
            name: SimpleNamespace(remote=getattr(mailbox, name))
            for name in ("request_checkpoint", "is_checkpoint_requested", "resize", "stream_cpus", "add_message")
        }
    )
    monkeypatch.setattr(ray, "get", lambda answer: answer)
    policy = DivisorPolicy(ScalingConfig(num_workers=8, resources_per_worker={"CPU": 1.0}), recipe(**RANGE), remote)
    monkeypatch.setattr(policy, "request_nodes", lambda: None)
    monkeypatch.setattr(policy, "_room", lambda: 8)
    monkeypatch.setattr(policy, "_free", lambda: 4)
    monkeypatch.setattr(policy, "_stream_fits", lambda workers: True)
    state: Any = SimpleNamespace(start_time=float("-inf"), num_workers=4)
    mailbox.begin_attempt(None)
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)
    assert mailbox.is_checkpoint_requested()
    assert isinstance(policy.make_decision_for_running_worker_group(state, None), NoopDecision)  # it is not written yet
    mailbox.add_record({"step": 3, "steps": 9, "saved_s": 1.0})
    decision = policy.make_decision_for_running_worker_group(state, None)
    assert isinstance(decision, ResizeDecision)
    assert (decision.num_workers, decision.resources_per_worker) == (8, {"CPU": 1.0})
    assert mailbox.begin_attempt(None) == 8
