"""Patch of Ray Serve that keeps replicas on loopback where their Ray listens there.

Each replica opens a gRPC port for calls between deployments on all addresses of the machine, and unpickles what arrives. Ray's
token guards the port (unless `RAY_AUTH_MODE` turns that off), but on a Ray of this machine alone nobody else needs to reach it at
all. Ray has no setting for it, so a private function is replaced, read in Ray 2.60.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica

_INTERNALS: Any = replica


def listen_on_loopback() -> None:
    """Makes Serve open this replica's port on its node's address if that is loopback. Call it before the replica is ready."""
    address: str = ray.util.get_node_ip_address()
    if not address.startswith("127."):
        return
    add_port = _INTERNALS.add_port_to_grpc_server

    def add(server: Any, everywhere: str) -> Any:
        return add_port(server, everywhere.replace("[::]", address))

    _INTERNALS.add_port_to_grpc_server = add
