"""Private API of Ray and Ray Train V2, read in version 2.60.0. tests/train/distributed/test_compat.py fails when it changes.

scaling policies                 base class and decisions; Ray Train has no public argument for one
failure policies                 base class and decisions; Ray Train counts every failure of a worker group
_initialize_and_run_controller   where policies of one's own replace Ray Train's
_register_sigint_handler         where Ctrl-C can be noted
get_train_context                the notice that a node is about to be taken away, without waiting for all workers
draining nodes, free resources   of the cluster, node by node
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ray._private.state import available_resources_per_node
from ray._private.state import state as _cluster
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.context import get_train_context
from ray.train.v2._internal.execution.failure_handling import FailureDecision, FailurePolicy
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy

__all__ = ["CHECKPOINT_SNAPSHOT", "NoopDecision", "PolicyTrainer", "RequestingPolicy", "ResizeDecision", "ScalingDecision"]

READ_IN_VERSION = "2.60.0"
CHECKPOINT_SNAPSHOT = CHECKPOINT_MANAGER_SNAPSHOT_FILENAME  # beside the checkpoints; Ray Train keeps there those of an earlier call


class RequestingPolicy(ScalingPolicy):
    """Base of a scaling policy: Ray Train's, with the private methods that a policy calls under public names."""

    def request_nodes(self) -> None:
        """Renews the request to Ray's autoscaler for `_get_num_workers_for_resource_request()` workers."""
        policy: Any = self
        policy._maybe_send_resource_request()

    def resize(self, workers: int) -> ResizeDecision:
        """The decision to run `workers` workers, each with the resources of the scaling config."""
        return ResizeDecision(num_workers=workers, resources_per_worker=self.scaling_config._resources_per_worker_not_none)


class LenientFailurePolicy(FailurePolicy):
    """Ray Train's failure policy, but for failures that `is_free` says cost nothing: after those training always starts again."""

    def __init__(self, policy: FailurePolicy, is_free: Callable[[BaseException], bool]) -> None:
        super().__init__(policy.failure_config)
        self._policy = policy
        self._is_free = is_free

    def make_decision(self, training_failed_error: Any) -> FailureDecision:
        """Starts again after a failure that costs nothing; else as Ray Train's policy, which counts up to `max_failures`."""
        return FailureDecision.RETRY if self._is_free(training_failed_error) else self._policy.make_decision(training_failed_error)


class PolicyTrainer(TorchTrainer):
    """Ray Train's `TorchTrainer` with a scaling policy, and failures that cost nothing; it has no arguments for them.

    `stopped` is true after Ctrl-C.
    """

    stopped = False

    def __init__(self, *arguments: Any, policy: ScalingPolicy, is_free: Callable[[BaseException], bool], **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._policy = policy
        self._is_free = is_free

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        trainer: Any = super()
        policies = {
            "scaling_policy": self._policy,
            "failure_policy": LenientFailurePolicy(settings["failure_policy"], self._is_free),
        }
        return trainer._initialize_and_run_controller(**settings | policies)

    def _register_sigint_handler(self, controller: Any) -> None:
        """Notes Ctrl-C: Ray Train ends in one of several ways after it, exit code 0 among them, and none of them says so."""
        trainer: Any = super()
        trainer._register_sigint_handler(controller)
        rays_handler: Any = signal.getsignal(signal.SIGINT)

        def handler(number: int, frame: Any) -> None:
            self.stopped = True
            rays_handler(number, frame)

        signal.signal(signal.SIGINT, handler)


def preemption_notice() -> object:
    """The newest notice that this worker's node is about to be taken away; None without one.

    `ray.train.get_preemption_info` waits until all workers have called it.
    """
    return get_train_context().preemption_context.preemption_info


def draining_nodes() -> set[str]:
    """Ids of the nodes that are being drained."""
    return set(_cluster.get_draining_nodes())


def free_resources() -> Sequence[Mapping[str, float]]:
    """Resources that are free now on each live node."""
    return list(available_resources_per_node().values())
