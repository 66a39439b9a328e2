"""Private API of Ray Serve, read in Ray 2.60: the controller's name and methods, and the address of replicas' gRPC ports.

`tests/serve/test_compat.py` fails where a later Ray changes what is used here.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import ray
from ray import serve
from ray.serve._private import replica as serve_replica
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

_REPLICA_MODULE: Any = serve_replica


def listen_on_loopback() -> None:
    """Makes Serve open this replica's gRPC port on its node's address if that is loopback. Call it before the replica is ready.

    Each replica opens that port, for calls between deployments, on all addresses of the machine, and unpickles what arrives. Ray's
    token guards it (unless `RAY_AUTH_MODE` turns that off), but on a Ray of this machine alone nobody else needs to reach it at
    all. Ray has no setting for it, so `add_port_to_grpc_server` is replaced in the module that calls it.
    """
    address: str = ray.util.get_node_ip_address()
    if not address.startswith("127."):
        return
    add_port = _REPLICA_MODULE.add_port_to_grpc_server

    def add_port_on_loopback(server: Any, target: str) -> Any:
        return add_port(server, target.replace("[::]", address))

    _REPLICA_MODULE.add_port_to_grpc_server = add_port_on_loopback


def serve_is_running() -> bool:
    """Whether the Ray cluster that this process is connected to has a Serve controller."""
    with contextlib.suppress(ValueError):
        _controller()
        return True
    return False


def proxies_host() -> str:
    """Address that Serve's HTTP proxies listen on in this cluster, whoever started them; `localhost` where none listens."""
    return str(ray.get(_controller().get_http_config.remote()).host or "localhost")


def shut_down_serve(timeout_s: float = 60.0) -> None:
    """Ends Serve. `serve.shutdown()` alone waits in the controller until that is killed, which Ray reports as a failure."""
    with contextlib.suppress(ValueError, ray.exceptions.RayActorError, ray.exceptions.GetTimeoutError):
        ray.get(_controller().graceful_shutdown.remote(wait=False), timeout=timeout_s)
    deadline = time.monotonic() + timeout_s
    while serve_is_running() and time.monotonic() < deadline:
        time.sleep(0.05)
    serve.shutdown()  # forgets the dead controller; kills one that still runs


def _controller() -> Any:
    """Handle of Serve's controller. Raises `ValueError` where there is none."""
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
