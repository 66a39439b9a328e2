"""Hosts on one machine: network namespaces joined by a bridge, a raylet in each, and links that can be cut or made slow.

Where namespaces are not permitted there are several raylets on loopback instead; `real` says which, and links cannot be cut then.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from tests.conftest import ROOT

RAY = str(Path(sys.executable).with_name("ray"))
REDIS = shutil.which("redis-server")
PORT, REDIS_PORT, DASHBOARD_PORT, CLIENT_PORT, AGENT_PORT = 6379, 6390, 8265, 10001, 52365


@dataclass
class Host:
    """One machine of the cluster; `prefix` is what runs a command on it."""

    name: str
    address: str
    prefix: list[str]
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)


@dataclass
class Hosts:
    """The head first. Commands run in a Ray of their own, which knows nothing of others on this machine."""

    folder: Path  # short: Unix socket paths hold 107 characters
    real: bool
    hosts: list[Host] = field(default_factory=list)
    switch: str = ""
    redis: bool = False  # whether the head keeps its state in one
    variables: dict[str, str] = field(default_factory=dict)  # of every process, besides Ray's
    token: str = field(default_factory=lambda: secrets.token_hex(32))

    @property
    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return (
            mine
            | self.variables
            | {
                "RAY_ADDRESS": f"{self.hosts[0].address}:{self.port(PORT)}",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": self.token,
                "PYTHONPATH": str(ROOT / "src"),
                "GLOO_SOCKET_IFNAME": "eth0" if self.real else "lo",
                "RAY_USAGE_STATS_ENABLED": "0",
                "RAY_raylet_start_wait_time_s": "240",  # several raylets start at once on a small machine
                "RAY_prestart_worker_first_driver": "0",  # nor need they start a process for each CPU that they say they have
                "RAY_local_fs_capacity_threshold": "0.995",  # the machine's disk is not what is tested
            }
        )

    @property
    def dashboard(self) -> str:
        return f"http://{self.hosts[0].address}:{self.port(DASHBOARD_PORT)}"

    def port(self, usual: int) -> int:
        """The usual port on a host of its own; on loopback, where others are, one further up."""
        return usual if self.real else usual + os.getpid() % 1000 + 1000

    def start_all(self, cpus: int, hidden: Path | None = None) -> None:
        """Ray on every host, with a dashboard on the head, until all have joined; the last one does not see `hidden`."""
        self.start(self.hosts[0], cpus)
        self.wait_for(1)
        for host in self.hosts[1:]:
            self.start(host, cpus, hidden if host is self.hosts[-1] else None)
        self.wait_for(len(self.hosts))

    def start(self, host: Host, cpus: int, hidden: Path | None = None) -> None:
        """Starts Ray there; `hidden` is a folder in whose place the host sees one of its own."""
        head = host is self.hosts[0]
        agent = self.port(AGENT_PORT) + self.hosts.index(host)
        command = [RAY, "start", f"--num-cpus={cpus}", "--object-store-memory=134217728", f"--dashboard-agent-listen-port={agent}"]
        environment = self.environment
        environment.pop("RAY_ADDRESS")
        if head:
            command += ["--head", f"--port={self.port(PORT)}", f"--temp-dir={self.folder}"]
            command += [f"--dashboard-host={host.address}", f"--dashboard-port={self.port(DASHBOARD_PORT)}"]
            command += [f"--ray-client-server-port={self.port(CLIENT_PORT)}"]
            if self.redis:
                assert REDIS is not None
                words = [REDIS, "--port", str(REDIS_PORT), "--bind", host.address, "--save", "", "--protected-mode", "no"]
                self._begin(host, words, environment)
                environment["RAY_REDIS_ADDRESS"] = f"{host.address}:{REDIS_PORT}"
        else:
            command += [f"--address={self.hosts[0].address}:{self.port(PORT)}"]
        command += [f"--node-ip-address={host.address}"] if self.real else []
        command += [] if head and self.redis else ["--block"]  # with --block Ray ends all of the head when its GCS ends
        self._begin(host, self._apart(host, hidden) + command, environment)

    def _apart(self, host: Host, hidden: Path | None) -> list[str]:
        """What starts a command with folders of the host's own: `hidden`, and Ray's, where two hosts would take the same names."""
        mounts = [f"mount -t tmpfs none {hidden}"] if hidden is not None else []
        if self.real and host is not self.hosts[0]:
            own = self.folder / f"own-{host.name}"
            shutil.rmtree(own, ignore_errors=True)
            own.mkdir()
            mounts.append(f"mount --bind {own} {self.folder}")
        return ["unshare", "-m", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"] if mounts else []

    def _begin(self, host: Host, command: list[str], environment: dict[str, str]) -> None:
        with (self.folder / f"{host.name}.log").open("ab") as log:
            host.started.append(
                subprocess.Popen([*host.prefix, *command], stdout=log, stderr=log, env=environment, start_new_session=True)
            )

    def restart_gcs(self, down_s: float) -> None:
        """Ends the head's GCS without a last word, and starts it again."""
        head = self.hosts[0]
        (pid,) = [pid for pid in self.pids(head) if b"gcs_server" in _read(pid, "cmdline").split(b"\0")[0]]
        command = [word.decode() for word in _read(pid, "cmdline").split(b"\0")[:-1]]
        environment = dict(entry.decode().split("=", 1) for entry in _read(pid, "environ").split(b"\0") if b"=" in entry)
        os.kill(pid, signal.SIGKILL)
        time.sleep(down_s)
        self._begin(head, command, environment)

    def run(self, host: Host, *words: str, timeout_s: float = 400.0) -> subprocess.CompletedProcess[str]:
        """A Python command on a host, connected to the cluster."""
        process = self.begin(host, *words)
        try:
            out, err = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def begin(self, host: Host, *words: str, **environment: str) -> subprocess.Popen[str]:
        command = [*host.prefix, sys.executable, *words]
        pipe = subprocess.PIPE
        whole = self.environment | environment
        return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=whole, cwd=self.folder)

    def wait_for(self, count: int, timeout_s: float = 300.0) -> None:
        """Until so many nodes are alive."""
        program = (
            "import ray, sys, time\nray.init(log_to_driver=False, logging_level='ERROR')\n"
            f"while sum(node['Alive'] for node in ray.nodes()) != {count}: time.sleep(0.5)\n"
        )
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                done = self.run(self.hosts[0], "-c", program, timeout_s=max(1.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(self.logs()) from None
            if done.returncode == 0:
                return
            assert time.monotonic() < deadline, done.stderr + self.logs()

    def logs(self) -> str:
        files = [*self.folder.glob("*.log"), *self.folder.glob("session_latest/logs/gcs_server.*")]
        return "\n".join(f"{file.name}: {file.read_text(errors='replace')[-2000:]}" for file in files)

    def pids(self, host: Host) -> list[int]:
        """Processes of a host: in its namespace, or of the sessions that were started for it."""
        if self.real:
            listed = subprocess.run(["ip", "netns", "pids", host.name], capture_output=True, text=True, check=False)
            return [int(pid) for pid in listed.stdout.split()]
        sessions = ",".join(str(process.pid) for process in host.started)
        listed = subprocess.run(["ps", "-o", "pid=", "-s", sessions], capture_output=True, text=True, check=False)
        return [int(pid) for pid in listed.stdout.split()]

    def running(self, what: str) -> list[Host]:
        """The hosts on which an actor of Ray's runs whose name has `what` in it."""
        return [host for host in self.hosts if any(what.encode() in _read(pid, "cmdline") for pid in self.pids(host))]

    def kill(self, host: Host) -> None:
        """Every process of the host ends at once, and none gets to say a last word."""
        while host.started and (left := self.pids(host)):
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
        for process in host.started:
            process.wait(timeout=60)
        host.started.clear()

    def link(self, host: Host, *, up: bool) -> None:
        """Cuts the host off, or brings it back."""
        _ip("netns", "exec", self.switch, "ip", "link", "set", f"p{host.name}", "up" if up else "down")

    @contextmanager
    def slow_link(self, host: Host, delay_s: float, loss: float) -> Iterator[None]:
        """Every frame to and from the host comes so much later, or with the probability `loss` never."""
        # What leaves the host is whole frames with checksums, since they pass through a program and not a driver.
        off = [sys.executable, "-m", "tests.cluster.forwarder", "--plain", "eth0"]
        subprocess.run([*host.prefix, *off], check=True, cwd=ROOT)
        inside = ["ip", "netns", "exec", self.switch]
        words = [sys.executable, "-m", "tests.cluster.forwarder", f"p{host.name}", "br0", str(delay_s), str(loss)]
        forwarder = subprocess.Popen([*inside, *words], cwd=ROOT)
        try:
            yield
        finally:
            forwarder.kill()
            forwarder.wait(timeout=60)
            _ip("netns", "exec", self.switch, "ip", "link", "set", f"p{host.name}", "master", "br0")


def _read(pid: int, name: str) -> bytes:
    """A file of /proc about a process; nothing if it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def hosts(count: int) -> Iterator[Hosts]:
    """`count` hosts without Ray; everything on them ends with the block, which SIGTERM ends as well."""
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    tag = secrets.token_hex(2)
    folder = Path(tempfile.gettempdir()) / f"h{tag}"
    folder.mkdir()
    cluster = Hosts(folder, real=True)
    try:
        try:
            _wire(cluster, tag, count)
        except (OSError, subprocess.CalledProcessError) as error:
            _unwire(cluster)
            cluster.real, cluster.hosts = False, [Host(f"n{tag}{number}", "127.0.0.1", []) for number in range(count)]
            print(f"network namespaces are not permitted here ({error}): several raylets on loopback instead", file=sys.stderr)
        yield cluster
    finally:
        for host in cluster.hosts:
            cluster.kill(host)
        _unwire(cluster)
        subprocess.run(["rm", "-rf", str(folder)], check=False)
        signal.signal(signal.SIGTERM, before)


def _wire(cluster: Hosts, tag: str, count: int) -> None:
    """A namespace for the switch, one for each host, and a veth pair between the two."""
    cluster.switch = f"s{tag}"
    _ip("netns", "add", cluster.switch)
    inside = ("netns", "exec", cluster.switch, "ip")
    _ip(*inside, "link", "add", "br0", "type", "bridge")
    _ip(*inside, "link", "set", "br0", "up")
    for number in range(count):
        name = f"n{tag}{number}"
        _ip("netns", "add", name)
        cluster.hosts.append(Host(name, f"10.77.0.{number + 1}", ["ip", "netns", "exec", name]))
        _ip(*inside, "link", "add", f"p{name}", "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip(*inside, "link", "set", f"p{name}", "master", "br0", "up")
        inside_host = ("netns", "exec", name, "ip")
        _ip(*inside_host, "address", "add", f"10.77.0.{number + 1}/24", "dev", "eth0")
        _ip(*inside_host, "link", "set", "eth0", "up")
        _ip(*inside_host, "link", "set", "lo", "up")


def _unwire(cluster: Hosts) -> None:
    for name in (*(host.name for host in cluster.hosts if cluster.real), cluster.switch):
        if name:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
