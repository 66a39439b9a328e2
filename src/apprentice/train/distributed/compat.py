"""Private API of Ray and Ray Train V2, read in version 2.60.0. tests/train/distributed/test_compat.py fails when it changes.

scaling policies                 base class and decisions; Ray Train has no public argument for one
_initialize_and_run_controller   where a policy of one's own replaces Ray Train's
_register_sigint_handler         where Ctrl-C can be noted
get_train_context                the notice that a node is about to be taken away, without waiting for all workers
draining nodes, free resources   of the cluster, node by node
"""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from ray._private.state import available_resources_per_node
from ray._private.state import state as _cluster
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
from ray.train.v2._internal.execution.context import get_train_context
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


class PolicyTrainer(TorchTrainer):
    """Ray Train's `TorchTrainer` with a scaling policy, for which it has no argument; `stopped` is true after Ctrl-C."""

    stopped = False

    def __init__(self, *arguments: Any, policy: ScalingPolicy, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._policy = policy

    def _initialize_and_run_controller(self, **settings: Any) -> Any:
        trainer: Any = super()
        return trainer._initialize_and_run_controller(**settings | {"scaling_policy": self._policy})

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
