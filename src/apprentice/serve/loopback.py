"""Ray Serve's replicas on loopback where their Ray is: a private part of Ray, read in 2.60, that has no setting.

Each replica opens a port for calls between deployments on all addresses of the machine, and unpickles what comes. Ray's token
guards it (where `RAY_AUTH_MODE` does not switch that off); on a Ray of this machine alone nobody else has to reach it at all.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica

_INTERNALS: Any = replica


def listen_on_loopback() -> None:
    """Called in a replica before it is ready: its port is opened on its node's address where that is loopback."""
    address: str = ray.util.get_node_ip_address()
    if not address.startswith("127."):
        return
    add_port = _INTERNALS.add_port_to_grpc_server

    def add(server: Any, everywhere: str) -> Any:
        return add_port(server, everywhere.replace("[::]", address))

    _INTERNALS.add_port_to_grpc_server = add
