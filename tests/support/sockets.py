"""Sockets: what this process and those that it started listen on, and a free port."""

from __future__ import annotations

import socket
from contextlib import suppress

import psutil


def listening() -> list[tuple[str, str]]:
    """(process, address) of each listening socket, IPv4 addresses as such."""
    listeners = []
    own = psutil.Process()
    for process in (own, *own.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            for connection in process.net_connections("inet"):
                if connection.status == psutil.CONN_LISTEN:
                    listeners.append((process.name(), connection.laddr.ip.removeprefix("::ffff:")))
    return listeners


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
