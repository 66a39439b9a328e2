"""Request for nodes to the cluster's autoscaler (version 2 of Ray's: KubeRay's, and that of `ray up` on a cloud), and the wait.

A group of pods with GPUs that begins with 0 replicas has no GPU until something asks for one. Training looks for its resources
before it starts anything, so it asks here first.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence

import ray
from ray.util import placement_group, placement_group_table, remove_placement_group
from ray.util.placement_group import PlacementGroup

from apprentice.ray_cluster.compat import autoscaling_state, is_infeasible
from apprentice.ray_cluster.nodes import node_resources

Nodes = Sequence[dict[str, float]]  # Ray's resources (name → amount) of each node
POLL_S = 2.0
WAIT_S = 1800.0  # a cloud's node with GPUs and an image of 10 GB takes 5 to 15 minutes


def request_nodes(bundles: Sequence[dict[str, float]], has_enough: Callable[[Nodes], bool], report: Callable[[str], None]) -> None:
    """Asks the autoscaler for nodes with room for `bundles` (resources by name, each on one node), and waits for them.

    Returns at once where the nodes have enough already, where the cluster has no autoscaler, and where its autoscaler says that it
    can never have as much; and when the bundles have a place, whatever `has_enough` says, since what they reserve is not free then.
    After `WAIT_S` seconds it gives up. So the caller checks the resources itself, as without an autoscaler. `report` is called with
    a sentence when the wait begins.

    The request is a placement group, which Ray gives up when this process ends in any way; `ray.autoscaler.sdk.request_resources`
    would go on holding nodes for a process that was killed, and knows one request for a whole cluster.
    """
    if has_enough(node_resources()) or not has_autoscaler():
        return
    group = placement_group(list(bundles))
    try:
        _wait(group, has_enough, report, _describe(bundles))
    finally:
        if ray.is_initialized():
            remove_placement_group(group)


def _wait(group: PlacementGroup, has_enough: Callable[[Nodes], bool], report: Callable[[str], None], request: str) -> None:
    """Returns when the nodes have enough, when `group` has its place or can never have one, or after `WAIT_S` s."""
    began = time.monotonic()
    is_reported = False
    while not has_enough(node_resources()) and time.monotonic() - began < WAIT_S:
        if placement_group_table(group)["state"] == "CREATED" or is_infeasible(group.id.hex()):
            return
        if time.monotonic() - began >= POLL_S and not is_reported:
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
