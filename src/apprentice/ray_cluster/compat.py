"""Private API of Ray that this room needs, in one place; read in Ray 2.60.0."""

from __future__ import annotations

from typing import Any

import ray
from ray._raylet import GcsClient  # type: ignore[attr-defined]
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply  # type: ignore[attr-defined]


def autoscaling_state() -> Any | None:
    """State that the cluster's autoscaler (version 2) last wrote, as Ray's protobuf message; None where there is none."""
    reply = GetClusterStatusReply()
    reply.ParseFromString(GcsClient(ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return (
        reply.autoscaling_state
        if reply.HasField("autoscaling_state") and reply.autoscaling_state.autoscaler_state_version
        else None
    )
