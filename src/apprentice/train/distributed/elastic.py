"""How many workers a run has while nodes come and go: the most that there is room for and that divide the run's largest number.

Ray Train's own elastic policy takes any number in the range; only with a divisor is each step the same rows (see data/pipeline). A
run grows at a checkpoint that it makes for this, so that no step is made twice for it. Where a node is lost that only made rows,
what ran there would wait for ever for CPUs that the rest of the stream holds, and all starts again with what is left. Knows Ray
Train's controller, which calls it in its own process; nothing of models or rows.
"""

from __future__ import annotations

import signal
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray
from ray._private.state import available_resources_per_node
from ray._private.state import state as cluster
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.execution.scaling_policy import NoopDecision, ResizeDecision, ScalingDecision, ScalingPolicy

from apprentice.errors import ResourcesError
from apprentice.ray_cluster.nodes import is_job, node_resources
from apprentice.recipe import Recipe
from apprentice.train.distributed.resources import required_resources, slots, workers_that_fit

LOOK_EVERY_S = 30.0  # for room to grow; growing costs the start of a worker group
WAIT_S = 1.0  # between two looks while there is room for none
ANSWER_S = 2.0  # that a node may take to accept a connection


class DivisorPolicy(ScalingPolicy):
    """Decides for one run; `mailbox` is told each number of workers, and asked for the checkpoint at which to grow."""

    def __init__(self, scaling: Any, recipe: Recipe, mailbox: Any) -> None:
        super().__init__(scaling)
        self._recipe = recipe
        self._mailbox = mailbox
        self._submitted = is_job()  # here, because the controller's process does not know
        self._look_every_s = LOOK_EVERY_S
        self._looked = float("-inf")
        self._grow_to: int | None = None
        self._told = False

    def _get_num_workers_for_resource_request(self) -> int:
        return self._recipe.training.max_workers

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        self._ask_for_nodes()
        self._mailbox.part.remote()
        self._grow_to = None
        workers = self._room()
        if workers == 0:
            if not self._told:
                self._mailbox.note.remote(f"there is no room for {self._recipe.training.min_workers} workers; waiting for nodes")
                self._told = True
            time.sleep(WAIT_S)  # the controller would ask again at once
            return NoopDecision()
        self._told = False
        return self._resize(workers)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        self._ask_for_nodes()
        now = time.monotonic()
        if self._grow_to is not None and not ray.get(self._mailbox.wanted.remote()):
            return self._resize(self._grow_to)
        if now - max(worker_group_state.start_time, self._looked) < self._look_every_s:
            return NoopDecision()
        self._looked = now
        workers, more = worker_group_state.num_workers, self._room()
        if more and not self._stream_fits(workers):
            self._mailbox.note.remote("a node that made rows is lost; training starts again from its checkpoint, with what is left")
            return self._resize(min(workers, more))
        self._grow_to = more if more > workers and self._free() >= more - workers else None
        if self._grow_to is not None:
            ray.get(self._mailbox.want.remote())
        return NoopDecision()

    def _ask_for_nodes(self) -> None:
        """Keeps the autoscaler busy with the largest number."""
        ours: Any = self
        ours._maybe_send_resource_request()

    def _resize(self, workers: int) -> ResizeDecision:
        self._grow_to = None
        ray.get(self._mailbox.resize.remote(workers))
        return ResizeDecision(num_workers=workers, resources_per_worker=self.scaling_config._resources_per_worker_not_none)

    def _room(self) -> int:
        """Workers that the live nodes can hold; 0 for fewer than the recipe's least."""
        try:
            return workers_that_fit(self._recipe, node_resources(job=self._submitted, without=leaving(ray.nodes())))
        except ResourcesError:
            return 0

    def _stream_fits(self, workers: int) -> bool:
        """Whether the live nodes have the CPUs of the workers, of the stream as it was begun, and one for Ray Data's own tasks."""
        there = sum(node.get("CPU", 0.0) for node in node_resources(job=self._submitted))
        of_workers = workers * self._recipe.training.resources.cpus
        return bool(there >= of_workers + ray.get(self._mailbox.stream_cpus.remote()) + 1)

    def _free(self) -> int:
        """Workers that fit into what nobody uses now."""
        return slots(required_resources(self._recipe), list(available_resources_per_node().values()))


def leaving(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Nodes that Ray lists as alive and that are about to go, or gone: it takes a while to believe that of a killed one."""
    return set(cluster.get_draining_nodes()) | {node["NodeID"] for node in nodes if node["Alive"] and not _answers(node)}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S):
            return True
    except OSError:
        return False


class Trainer(TorchTrainer):
    """Ray Train's trainer with a policy of ours, for which it has no argument; it knows whether Ctrl-C `stopped` it."""

    stopped = False

    def __init__(self, *arguments: Any, policy: ScalingPolicy, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._policy = policy

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        inner: Any = super()
        return inner._initialize_and_run_controller(**given | {"scaling_policy": self._policy})

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ray Train ends in one of several ways after Ctrl-C, with exit code 0 among them, and none of them says so."""
        inner: Any = super()
        inner._register_sigint_handler(controller)
        theirs: Any = signal.getsignal(signal.SIGINT)

        def handler(number: int, frame: Any) -> None:
            self.stopped = True
            theirs(number, frame)

        signal.signal(signal.SIGINT, handler)
