"""Request for nodes to the cluster's autoscaler (version 2 of Ray's: KubeRay's, and that of `ray up` on a cloud), and the wait.

A group of pods with GPUs that begins with 0 replicas has no GPU until something asks for one. Training looks for its resources
before it starts anything, so it asks here first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import ray
from ray.autoscaler.sdk import request_resources

from apprentice.ray_cluster.compat import autoscaling_state
from apprentice.ray_cluster.nodes import node_resources

Nodes = Sequence[dict[str, float]]  # Ray's resources (name → amount) of each node
POLL_S = 2.0
WAIT_S = 1800.0  # a cloud's node with GPUs and an image of 10 GB takes 5 to 15 minutes


@contextmanager
def requested_nodes(
    bundles: Sequence[dict[str, float]], has_enough: Callable[[Nodes], bool], report: Callable[[str], None]
) -> Iterator[None]:
    """Asks the autoscaler for nodes with room for `bundles`, waits for them, and withdraws the request when the `with` block ends.

    Returns at once where the nodes have enough already, where the cluster has no autoscaler, and where its autoscaler says that it
    can never have as much; after `WAIT_S` seconds it gives up. So the caller checks the resources itself, as without an autoscaler.
    `report` is called with a sentence when the wait begins. Ray keeps one such request for a cluster: the newest one counts.
    """
    before = autoscaling_state()
    if before is None or has_enough(node_resources()):
        yield
        return
    request_resources(bundles=list(bundles))
    try:
        _wait(before.last_seen_cluster_resource_state_version, has_enough, report, _describe(bundles))
        yield
    finally:
        if ray.is_initialized():
            request_resources(bundles=[])


def _wait(version: int, has_enough: Callable[[Nodes], bool], report: Callable[[str], None], request: str) -> None:
    """Returns when the nodes have enough, when they never will, or after `WAIT_S` seconds.

    `version` is that of the cluster's state which the autoscaler saw last before the request.
    """
    began = time.monotonic()
    is_reported = False
    while not has_enough(node_resources()) and time.monotonic() - began < WAIT_S:
        state = autoscaling_state()
        # The cluster's state gets a new version whenever the autoscaler asks for it; the one after next surely has the request.
        is_answer = state is not None and state.last_seen_cluster_resource_state_version >= version + 2
        if state is not None and is_answer and state.infeasible_cluster_resource_constraints:
            return
        if is_answer and not is_reported:
            report(f"waiting for nodes: the cluster's autoscaler was asked for {request}, and may take minutes")
            is_reported = True
        time.sleep(POLL_S)


def has_autoscaler() -> bool:
    """Whether the cluster has an autoscaler (version 2), which may add nodes."""
    return autoscaling_state() is not None


def _describe(bundles: Sequence[dict[str, float]]) -> str:
    """For example "8 × 8 CPUs and 1 GPU, 2 × 1 CPU"."""
    counts = Counter(tuple(bundle.items()) for bundle in bundles)
    units = {
        bundle: " and ".join(f"{amount:g} {name}{'s' if amount != 1 and name.isupper() else ''}" for name, amount in bundle)
        for bundle in counts
    }
    return ", ".join(f"{count} × {units[bundle]}" for bundle, count in counts.items())
