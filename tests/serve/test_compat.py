"""The private API of Ray Serve that `compat` uses is there, as it was read in Ray 2.60."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve._private import controller, replica

from apprentice.serve import compat


def test_the_controller_has_the_name_and_methods_that_are_called() -> None:
    assert (compat.SERVE_CONTROLLER_NAME, compat.SERVE_NAMESPACE) == ("SERVE_CONTROLLER_ACTOR", "serve")
    assert "wait" in inspect.signature(controller.ServeController.graceful_shutdown).parameters
    parameters = set(inspect.signature(controller.ServeController.get_http_config).parameters)
    assert parameters - {"_ray_trace_ctx"} == {"self"}  # which Ray adds where the class has become an actor in this process


def test_replicas_open_their_port_through_the_function_that_is_replaced() -> None:
    assert 'add_port_to_grpc_server(self._server, "[::]:' in inspect.getsource(replica)


@pytest.mark.parametrize(("node", "target"), [("127.0.0.1", "127.0.0.1:0"), ("10.0.0.7", "[::]:0")])
def test_a_replica_listens_on_loopback_where_its_node_does(monkeypatch: pytest.MonkeyPatch, node: str, target: str) -> None:
    targets: list[str] = []

    def add_port(server: Any, address: str) -> int:
        targets.append(address)
        return 1

    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: node)
    monkeypatch.setattr(replica, "add_port_to_grpc_server", add_port)
    compat.listen_on_loopback()
    replica.add_port_to_grpc_server(SimpleNamespace(), "[::]:0")
    assert targets == [target]
