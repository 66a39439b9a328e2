"""The private API of Ray and Ray Train that we use is still that of the release in which it was read."""

from __future__ import annotations

import inspect
import pickle
from dataclasses import fields
from importlib.metadata import version
from types import SimpleNamespace
from typing import Any

import pytest
from ray.train import FailureConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.exceptions import UserExceptionWithTraceback
from ray.train.v2._internal.execution.checkpoint import checkpoint_manager
from ray.train.v2._internal.execution.context import TrainContext
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.failure_handling.default import DefaultFailurePolicy
from ray.train.v2._internal.execution.preemption import PreemptionContext
from ray.train.v2._internal.execution.scaling_policy import ScalingPolicy
from ray.train.v2.api.exceptions import WorkerGroupError

from apprentice.errors import TrainingError
from apprentice.train.distributed import compat
from apprentice.train.distributed.failure import is_memory_shortage
from apprentice.train.worker_config import MicroBatchTooLargeError


def test_ray_is_the_release_that_was_read() -> None:
    assert version("ray") == compat.READ_IN_VERSION, "read distributed/compat.py against the new release, then raise its version"


def test_ray_train_still_has_what_we_override() -> None:
    assert all(f"{policy}_policy=" in inspect.getsource(TorchTrainer.fit) for policy in ("scaling", "failure"))
    assert FailurePolicy.__abstractmethods__ == {"make_decision"}
    assert list(inspect.signature(TorchTrainer._initialize_and_run_controller).parameters) == ["self", "controller_init_kwargs"]
    assert list(inspect.signature(TorchTrainer._register_sigint_handler).parameters) == ["self", "controller"]
    assert ScalingPolicy.__abstractmethods__ == {
        "make_decision_for_non_running_worker_group",
        "make_decision_for_running_worker_group",
        "_get_num_workers_for_resource_request",
    }
    assert list(inspect.signature(ScalingPolicy._maybe_send_resource_request).parameters) == ["self"]
    assert "checkpoint_manager_snapshot_path" in inspect.getsource(checkpoint_manager)
    assert compat.CHECKPOINT_SNAPSHOT == "checkpoint_manager_snapshot.json"


def test_a_failure_that_costs_nothing_is_not_counted() -> None:
    rays = DefaultFailurePolicy(FailureConfig(max_failures=1))
    policy = pickle.loads(
        pickle.dumps(compat.LenientFailurePolicy(rays, is_memory_shortage))
    )  # it goes to the controller's process
    shortage = WorkerGroupError("", {1: UserExceptionWithTraceback(MicroBatchTooLargeError(4, TrainingError("full")), "")})
    decisions = [policy.make_decision(error) for error in (shortage, shortage, WorkerGroupError("", {0: OSError()}), shortage)]
    assert decisions == [FailureDecision.RETRY] * 4
    assert policy.make_decision(WorkerGroupError("", {0: OSError()})) == FailureDecision.RAISE


def test_a_resize_takes_the_resources_of_the_scaling_config() -> None:
    class Policy(compat.RequestingPolicy):
        def _get_num_workers_for_resource_request(self) -> int:
            return 2

        def make_decision_for_non_running_worker_group(self) -> Any: ...

        def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> Any: ...

    decision = Policy(ScalingConfig(num_workers=2, resources_per_worker={"CPU": 3.0})).resize(1)
    assert (decision.num_workers, decision.resources_per_worker) == (1, {"CPU": 3.0})


def test_a_preemption_notice_is_read_from_the_workers_context(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "preemption_context" in {field.name for field in fields(TrainContext)}
    notice = object()
    context = PreemptionContext()
    assert context.preemption_info is None
    monkeypatch.setattr(context, "preemption_info", notice)
    monkeypatch.setattr(compat, "get_train_context", lambda: SimpleNamespace(preemption_context=context))
    assert compat.preemption_notice() is notice
