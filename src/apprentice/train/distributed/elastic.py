"""Elastic scaling policy: the number of workers while nodes come and go.

It is the largest divisor of the run's largest number of workers for which there is room; with several lanes (recipe/lanes.py), one
that divides their number or that it divides. Example: `workers` from 2 to 8, so that 2,
4 and 8 are possible, with one CPU each, on nodes of 4 CPUs, two of which stay for the stream of rows.

    nodes  room  decision                                                       workers
        2     6  start with what fits                                                 4
        3    10  a node joined: request a checkpoint, and resize once it is written   8
        2     6  a node with workers was lost: resize at the newest checkpoint        4
        1     2  another was lost                                                     2
        0     0  wait for nodes                                                       0

Each step has the same rows all along: 4 workers take 8 rows each of a global batch of 32, 8 workers take 4 each, in the same order
(see data/stream.py). With 7 workers, which Ray Train's own elastic policy would take, no such split exists. Growing at a checkpoint
made for it repeats no step. If a node is lost that ran only data actors, these would wait for ever for CPUs that the rest of the
stream holds, so the worker group is restarted with what is left.

Ray Train's controller calls the policy, in its own process.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from apprentice.errors import ResourcesError
from apprentice.ray_cluster.nodes import is_job, node_resources
from apprentice.recipe import Recipe
from apprentice.train.distributed.compat import (
    NoopDecision,
    RequestingPolicy,
    ResizeDecision,
    ScalingDecision,
    draining_nodes,
    free_resources,
)
from apprentice.train.distributed.resources import count_slots, required_resources, workers_that_fit

LOOK_EVERY_S = 30.0  # between two checks for room to grow; growing costs the start of a worker group
WAIT_S = 1.0  # between two checks while there is not enough room to run
ANSWER_S = 2.0  # in which a live node accepts a connection


class DivisorPolicy(RequestingPolicy):
    """Scaling policy of one run. It tells `mailbox` each number of workers, and requests there the checkpoint at which to grow."""

    def __init__(self, scaling: Any, recipe: Recipe, mailbox: Any) -> None:
        super().__init__(scaling)
        self._recipe = recipe
        self._mailbox = mailbox
        self._submitted = is_job()  # here, because the controller's process does not know
        self._look_every_s = LOOK_EVERY_S
        self._looked_at = float("-inf")
        self._grow_to: int | None = None
        self._is_waiting = False  # and the user was told so

    def _get_num_workers_for_resource_request(self) -> int:
        return self._recipe.training.max_workers

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """Starts a worker group with as many workers as there is room for, or waits."""
        self.request_nodes()
        self._mailbox.forget_workers.remote()
        self._grow_to = None
        workers = self._room()
        if workers == 0:
            if not self._is_waiting:
                self._mailbox.wait_for_nodes.remote(
                    f"there is no room for {self._recipe.worker_numbers[0]} workers; waiting for nodes"
                )
                self._is_waiting = True
            time.sleep(WAIT_S)  # the controller asks again at once
            return NoopDecision()
        self._is_waiting = False
        return self._resize(workers)

    def make_decision_for_running_worker_group(self, worker_group_state: Any, worker_group_status: Any) -> ScalingDecision:
        """Grows at the checkpoint requested for it, restarts a stream that lost a node, or leaves the group as it is."""
        self.request_nodes()
        now = time.monotonic()
        if self._grow_to is not None and not ray.get(self._mailbox.is_checkpoint_requested.remote()):
            return self._resize(self._grow_to)
        if now - max(worker_group_state.start_time, self._looked_at) < self._look_every_s:
            return NoopDecision()
        self._looked_at = now
        workers, more = worker_group_state.num_workers, self._room()
        if more and not self._stream_fits(workers):
            self._mailbox.add_message.remote(
                "a node that made rows is lost; training starts again from its checkpoint, with what is left"
            )
            return self._resize(min(workers, more))
        self._grow_to = more if more > workers and self._free() >= more - workers else None
        if self._grow_to is not None:
            ray.get(self._mailbox.request_checkpoint.remote())
        return NoopDecision()

    def _resize(self, workers: int) -> ResizeDecision:
        self._grow_to = None
        ray.get(self._mailbox.resize.remote(workers))
        return self.resize(workers)

    def _room(self) -> int:
        """Number of workers for which the live nodes have room; 0 if fewer than the recipe's least."""
        try:
            return workers_that_fit(self._recipe, node_resources(job=self._submitted, without=find_leaving_nodes(ray.nodes())))
        except ResourcesError:
            return 0

    def _stream_fits(self, workers: int) -> bool:
        """Whether the live nodes have CPUs for the workers, the data actors of this attempt and one of Ray Data's own tasks."""
        live = sum(node.get("CPU", 0.0) for node in node_resources(job=self._submitted))
        of_workers = workers * self._recipe.training.resources.cpus
        return bool(live >= of_workers + ray.get(self._mailbox.stream_cpus.remote()) + 1)

    def _free(self) -> int:
        """Number of workers that fit into the resources free now."""
        return count_slots(required_resources(self._recipe), free_resources())


def find_leaving_nodes(nodes: Sequence[Mapping[str, Any]]) -> set[str]:
    """Ids of nodes that are draining, or that Ray lists as alive but that accept no connection.

    Ray takes a while to notice that a node was killed.
    """
    return draining_nodes() | {node["NodeID"] for node in nodes if node["Alive"] and not _answers(node)}


def _answers(node: Mapping[str, Any]) -> bool:
    try:
        with socket.create_connection((node["NodeManagerAddress"], node["NodeManagerPort"]), timeout=ANSWER_S):
            return True
    except OSError:
        return False
