"""What a run outlives on a cluster of several raylets: its driver killed, nodes killed or told to go, and new ones."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.recipes import tiny_recipe

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
STEPS, EVERY = 18, 3
DRIVER_DIES, NODE_DIES, GROWS = 5, 8, 10  # before these steps
NOTICE_S = 45  # that a node has left when it is told to go
# Ray's head asks each node more often than usual whether it lives; how long it waits for an answer stays as it is.
ASKED_OFTEN = {"health_check_period_ms": 500, "health_check_initial_delay_ms": 500}


def eventually(what: str, condition: Callable[[], Any], seconds: float = 400.0) -> Any:
    """The first true value of `found()`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} seconds"
        time.sleep(0.05)
    return value


class Nodes:
    """A Ray cluster of one process group a node, on this machine."""

    def __init__(self) -> None:
        from ray._private.services import node_ip_address_from_perspective
        from ray.cluster_utils import Cluster

        # Not loopback, which a Ray of this process may have for its own: drivers of other processes look for a cluster elsewhere.
        self.address = node_ip_address_from_perspective()
        head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 2**27, "node_ip_address": self.address}
        head["_system_config"] = ASKED_OFTEN
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes: dict[str, Any] = {}

    def add(self, cpus: int) -> None:
        node = self.cluster.add_node(num_cpus=cpus, object_store_memory=2**27, node_ip_address=self.address)
        self.nodes[node.node_id] = node

    def drain(self, node: str) -> None:
        """What an autoscaler says of a machine that is about to be taken away."""
        notice = ("drain-node", "--address", self.cluster.address, "--node-id", node, "--reason", "DRAIN_NODE_REASON_PREEMPTION")
        more = ("--reason-message", "spot", "--deadline-remaining-seconds", str(NOTICE_S))
        subprocess.run([Path(sys.executable).with_name("ray"), *notice, *more], check=True, capture_output=True)

    def kill(self, node: str) -> None:
        """SIGKILL to the raylet: what it started ends with it."""
        (raylet,) = self.nodes[node].all_processes["raylet"]
        os.kill(raylet.process.pid, signal.SIGKILL)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    nodes = Nodes()
    yield nodes
    nodes.cluster.shutdown()


class Driver:
    """`apprentice train` in a process of its own, whose workers wait before the steps in `hold`."""

    def __init__(self, nodes: Nodes, folder: Path, hold: list[int]) -> None:
        self.folder = folder
        self.log = folder / f"driver-{time.monotonic_ns()}.log"
        script = [sys.executable, str(Path(__file__).with_name("paused_training.py")), str(folder / "recipe.yaml"), str(folder)]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(
                [*script, *map(str, hold)], stdout=out, stderr=out, env=os.environ | {"RAY_ADDRESS": nodes.cluster.address}
            )

    def until(self, what: str, condition: Callable[[], Any]) -> Any:
        def alive() -> Any:
            assert self.process.poll() is None, self.log.read_text()
            return condition()

        try:
            return eventually(what, alive)
        except AssertionError as error:
            last = "\n".join(json.dumps(record)[:300] for record in records(self.folder)[-12:])
            raise AssertionError(f"{error}\n{self.log.read_text()[-4000:]}\n{last}") from None

    def held(self, step: int, workers: int) -> list[dict[str, Any]]:
        """The workers once all of them wait before `step`, in order of rank."""
        files = [self.folder / f"at-{step}-{rank}" for rank in range(workers)]

        def there() -> list[dict[str, Any]]:
            try:
                return [json.loads(file.read_text()) for file in files]
            except (OSError, ValueError):
                return []

        return list(self.until(f"{workers} workers before step {step}", there))

    def go(self, step: int) -> None:
        for file in self.folder.glob(f"at-{step}-*"):
            file.unlink()
        (self.folder / f"go-{step}").touch()


def records(folder: Path) -> list[dict[str, Any]]:
    file = folder / "runs" / "tiny" / "steps.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def told(folder: Path) -> list[str]:
    return [record["message"] for record in records(folder) if "training goes on with" in record.get("message", "")]


def told_to_go(nodes: Nodes, driver: Driver, step: int) -> int:
    """A node of a worker is to go while both wait before `step`: the step whose checkpoint was made for it.

    The checkpoint is none of those that are due anyway, and the next workers are on other nodes.
    """
    doomed = driver.held(step, 2)[1]["node"]
    if step % EVERY == 0:
        driver.go(step)
        step += 1
        driver.held(step, 2)
    (driver.folder / f"heard-{step}").unlink(missing_ok=True)
    nodes.drain(doomed)
    driver.until("the notice", (driver.folder / f"heard-{step}").exists)
    driver.go(step)
    driver.until(
        "the notice's checkpoint", lambda: any(record["step"] == step for record in records(driver.folder) if "saved_s" in record)
    )
    driver.until("workers elsewhere", lambda: doomed not in {worker["node"] for worker in driver.held(step + 1, 2)})
    return step


def test_a_run_outlives_its_driver_and_its_nodes(nodes: Nodes, tmp_path: Path, tiny_model: Path) -> None:
    """Each node has room for one worker of two CPUs; two CPUs are kept for the data, and four workers are the most."""
    from apprentice.data.stream import make_corpus, render_window
    from apprentice.recipe import load_recipe
    from apprentice.run.folder import open_run
    from apprentice.run.time_ledger import TimeLedger

    training = {"workers": {"min": 1, "max": 4}, "resources": {"cpus": 2}, "steps": STEPS, "global_batch": 4}
    training |= {"checkpoint": {"every_steps": EVERY, "keep": 9}, "optimizer": {"learning_rate": 0.001, "warmup_steps": 1}}
    file = tiny_recipe(tmp_path, tiny_model, training=training)
    nodes.add(3)
    nodes.add(3)

    driver = Driver(nodes, tmp_path, [DRIVER_DIES])
    driver.held(DRIVER_DIES, 2)
    driver.until("the checkpoint of step 3", (tmp_path / "runs" / "tiny" / "checkpoints" / "step-000003.2").exists)
    driver.process.kill()
    driver.process.wait()
    driver.go(DRIVER_DIES)

    later = list(range(GROWS, STEPS + 1))
    driver = Driver(nodes, tmp_path, [NODE_DIES, *later])
    second = driver.held(NODE_DIES, 2)[1]
    nodes.kill(second["node"])
    driver.until("fewer workers", lambda: told(tmp_path) == ["training goes on with 1 worker instead of 2"])
    driver.go(NODE_DIES)
    driver.held(GROWS, 1)
    nodes.add(3)
    nodes.add(2)  # there is room for three now, and three do not divide four
    driver.until("a wish", (tmp_path / f"heard-{GROWS}").exists)
    driver.go(GROWS)  # it grows at the end of this step
    driver.until("growth", lambda: len(told(tmp_path)) == 2)
    for mark in tmp_path.glob("at-*"):  # of the one worker
        mark.unlink()
    busy = {who["node"] for who in driver.held(GROWS + 1, 2)}
    nodes.kill(next(node for node in nodes.nodes if node not in busy | {second["node"]}))  # which only makes rows
    driver.until("a smaller stream", lambda: any("made rows is lost" in record.get("message", "") for record in records(tmp_path)))
    for mark in tmp_path.glob("at-*"):
        mark.unlink()
    nodes.add(3)
    saved = told_to_go(nodes, driver, GROWS + 1)
    for step in later:
        (tmp_path / f"go-{step}").touch()
    assert driver.process.wait(timeout=400) == 0, driver.log.read_text()
    assert told(tmp_path)[1] == "training goes on with 2 workers instead of 1"

    steps = [record for record in records(tmp_path) if "loss" in record]
    made = load_recipe(file)
    run = open_run(made)
    corpus = make_corpus(made, run, parallel=False)
    rows = [ids for window in range(4) for ids in render_window(corpus, window)["examples"]]
    expected = [[int(position) for row in rows[at : at + 4] for position in row] for at in range(0, 4 * STEPS, 4)]
    assert all(expected)
    for step in steps:
        assert step["examples"] == expected[step["step"] - 1]
    attempts = sorted({step["attempt"] for step in steps})
    assert attempts[-1] >= 6  # of which the fourth may have ended before its first step
    begins = [next(step["step"] for step in steps if step["attempt"] == attempt) for attempt in attempts]
    assert begins[:3] == [1, 4, 7]  # from the checkpoints of steps 3 and 6
    assert begins[3] == GROWS + 1  # and one that was made to grow
    assert list(run.checkpoints.local.glob(f"step-{begins[3] - 1:06d}.*"))
    assert begins[-1] == saved + 1  # of the notice's checkpoint
    assert list(run.checkpoints.local.glob(f"step-{saved:06d}.*"))
    assert {step["step"] for step in steps} == set(range(1, STEPS + 1))
    assert run.ledger_file.read_json()["examples"] == sum(map(len, expected))
    assert run.is_trained

    ledger = TimeLedger.from_status(run.status())
    assert ledger is not None
    assert ledger.faults >= 3  # the driver, a node with a worker, and one that made rows
    assert all(ledger.seconds[kind] > 0 for kind in ("steps", "lost_steps", "starting", "down"))
