"""What may go wrong on a cluster of several hosts, done to runs of the tiny model, and what becomes of them.

    python -m tests.cluster.faults [NAME …]             prints a table of faults and outcomes
    python -m tests.cluster.faults --write [NAME …]     and puts its lines into cluster/README.md

Each fault has hosts of its own. One that cannot be done on this machine is `not run` in the table, with the reason.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.cluster.hosts import REDIS, Hosts, hosts
from tests.cluster.runs import CPUS, STEPS, Place
from tests.cluster.serving_fault import guard, serving_host_dies
from tests.conftest import ROOT

TABLE = ROOT / "cluster" / "README.md"
HEAD = "| what happens | what becomes of it | after | at most |\n|---|---|---|---|\n"
SMALL, UNSEEN = "small", "unseen"  # folders of a place: a disk of its own, and what one host does not see


@dataclass(frozen=True)
class Fault:
    """`do` gives a sentence and the seconds until the run went on or ended, and raises `AssertionError` for another outcome.

    What it needs besides processes: `links` that can be cut, a `redis`, a `disk` of its own.
    """

    what: str
    do: Callable[[Place, float], tuple[str, float]]
    within_s: float
    needs: frozenset[str] = frozenset()


def nothing(place: Place, within_s: float) -> tuple[str, float]:
    began = time.monotonic()
    training = place.submit()
    training.reach(1)
    trained_on = len(place.cluster.running("RayTrainWorker"))
    place.restarts(training)
    assert (training.run / "report" / "report.html").is_file()
    assert trained_on == 2
    return "trained on two hosts, and scored", time.monotonic() - began


def host_is_killed(place: Place, within_s: float) -> tuple[str, float]:
    training = place.begin()
    training.reach(10)
    place.cluster.kill(place.loser())
    seconds = training.next_step(within_s)
    assert place.restarts(training) == 1
    return "training starts its workers again without that host, from the newest checkpoint", seconds


def link_is_cut(place: Place, within_s: float) -> tuple[str, float]:
    """Until Ray has given the host up; what is left of it then ends, and the host joins again as a new one."""
    training = place.begin(training__steps=3 * STEPS)
    training.reach(10)
    host = place.loser()
    place.cluster.link(host, up=False)
    seconds = training.next_step(within_s)
    place.cluster.link(host, up=True)
    place.cluster.kill(host)
    place.cluster.start(host, CPUS)
    place.cluster.wait_for(3)
    assert training.process.poll() is None
    assert place.restarts(training, 3 * STEPS) == 1
    return "Ray gives the host up and training goes on without it, as above; the host can join again meanwhile", seconds


def link_is_down_for_a_moment(place: Place, within_s: float) -> tuple[str, float]:
    training = place.begin()
    training.reach(10)
    host = place.loser()
    place.cluster.link(host, up=False)
    time.sleep(10)
    place.cluster.link(host, up=True)
    seconds = training.next_step(within_s)
    assert place.restarts(training) == 0
    return "training waits, and goes on when the link is back", seconds


def link_is_slow(place: Place, within_s: float) -> tuple[str, float]:
    training = place.begin(training__steps=16)
    training.reach(6)
    with place.cluster.slow_link(place.loser(), 0.2, 0.05):
        began = time.monotonic()
        seconds = training.next_step(within_s)
        training.reach(12)
        pace = (time.monotonic() - began) / 6
    restarts = place.restarts(training, 16)
    assert restarts == 0
    return f"training goes on slowly, {pace:.0f} s a step", seconds


def gcs_is_restarted(place: Place, within_s: float) -> tuple[str, float]:
    training = place.begin()
    training.reach(10)
    place.cluster.restart_gcs(down_s=5)
    seconds = training.next_step(within_s)
    restarts = place.restarts(training)
    place.cluster.wait_for(3)
    assert restarts == 0
    return "training goes on, and so does the cluster", seconds


FILL = """
import sys
import numpy as np, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
ray.init(log_to_driver=False, logging_level="ERROR")
def fill():
    return [ray.put(np.full(16 * 2**20, number, np.uint8)) for number in range(16)]
there = [NodeAffinitySchedulingStrategy(node["NodeID"], soft=False) for node in ray.nodes() if node["Alive"]]
held = ray.get([ray.remote(num_cpus=0)(fill).options(scheduling_strategy=one).remote() for one in there])
print("full", flush=True)
sys.stdin.read()
"""


def object_stores_are_filled(place: Place, within_s: float) -> tuple[str, float]:
    cluster, pipe = place.cluster, subprocess.PIPE
    training = place.begin()
    training.reach(6)
    command = [*cluster.hosts[0].prefix, sys.executable, "-c", FILL]
    kept = {"stdin": pipe, "stdout": pipe, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **kept, text=True, env=cluster.environment, cwd=cluster.folder) as filler:
        assert filler.stdout is not None
        assert filler.stdin is not None
        assert "full\n" in filler.stdout  # Ray tells of what it puts on disk there, too
        assert training.process.poll() is None
        seconds = training.next_step(within_s)
        restarts = place.restarts(training)
        filler.stdin.close()
    assert restarts == 0
    return "Ray puts what is too much on disk, and training goes on", seconds


def disk_is_full(place: Place, within_s: float) -> tuple[str, float]:
    storage = place.folder / SMALL
    training = place.begin(storage=str(storage))
    training.reach(6)
    rest = storage / "rest"
    with rest.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError:
            pass
    began = time.monotonic()
    code, said = training.end
    seconds = time.monotonic() - began
    rest.unlink()
    assert code == 1, f"{code}: {said}"
    assert "Traceback" not in said, said
    again = place.begin(storage=str(storage))
    place.restarts(again)
    return f"the command ends: “{plain(said, storage)}” Given again when there is room, it goes on to the end", seconds


def storage_is_not_shared(place: Place, within_s: float) -> tuple[str, float]:
    storage = place.folder / UNSEEN
    began = time.monotonic()
    code, said = place.begin(storage=str(storage)).end
    seconds = time.monotonic() - began
    assert code == 1, f"{code}: {said}"
    assert f"1 of 3 nodes do not see what is written here, {place.cluster.hosts[-1].address} (" in said
    assert list(storage.iterdir()) == []
    return f"the command ends before it has written anything: “{plain(said, storage)}”", seconds


def plain(said: str, storage: Path) -> str:
    """A sentence for the table."""
    return said.replace(str(storage), "/runs").replace("|", "\\|")


LINKS, DISK = frozenset({"links"}), frozenset({"disk"})
REDIS_WORDS = "the head's GCS, which keeps its state in Redis, is killed and back after 5 s"
FAULTS: dict[str, Fault] = {
    "none": Fault("nothing: `apprentice submit` of the whole pipeline", nothing, 300),
    "killed": Fault("a host that trains is killed", host_is_killed, 180),
    "cut": Fault("the link of a host that trains is cut", link_is_cut, 240, LINKS),
    "moment": Fault("the same link is down for 10 s", link_is_down_for_a_moment, 60, LINKS),
    "slow": Fault("200 ms of delay each way and 5% loss on that link", link_is_slow, 120, LINKS),
    "gcs": Fault(REDIS_WORDS, gcs_is_restarted, 120, LINKS | {"redis"}),
    "store": Fault("every host's object store is filled twice over", object_stores_are_filled, 120),
    "disk": Fault("the disk with `storage` is full", disk_is_full, 300, DISK),
    "unseen": Fault("a host does not see `storage`", storage_is_not_shared, 120, LINKS | {"unseen"}),
    "serving": Fault("one of two hosts that serve is killed under load", serving_host_dies, 120),
}


@contextmanager
def small_disk(folder: Path) -> Iterator[None]:
    """A file system of 16 MiB, which hosts see that start later."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def missing(fault: Fault, cluster: Hosts) -> str | None:
    """Why the fault cannot be done here; None if it can."""
    if "links" in fault.needs and not cluster.real:
        return "needs network namespaces"
    if "redis" in fault.needs and REDIS is None:
        return "needs redis-server"
    if "disk" in fault.needs and os.geteuid() != 0:
        return "needs root, to mount a disk"
    return None


def play(fault: Fault, model: Path, folder: Path) -> str:
    """The fault's line of the table. Raises `AssertionError` where it ends otherwise than it should."""
    with ExitStack() as stack:
        cluster = stack.enter_context(hosts(3))
        if (reason := missing(fault, cluster)) is not None:
            return f"| {fault.what} | not run: {reason} | | |"
        if "disk" in fault.needs:
            stack.enter_context(small_disk(folder / SMALL))
        cluster.redis = "redis" in fault.needs
        guard(cluster, folder / "keys.yaml")
        (folder / UNSEEN).mkdir()
        cluster.start_all(CPUS, hidden=folder / UNSEEN if "unseen" in fault.needs else None)
        sentence, seconds = fault.do(Place(cluster, folder, model), fault.within_s)
    assert seconds <= fault.within_s, f"{sentence}, but after {seconds:.0f} s"
    return f"| {fault.what} | {sentence} | {seconds:.0f} s | {fault.within_s:.0f} s |"


def lines_of(text: str) -> dict[str, str]:
    """What the table in `text` says of each fault, by the first column."""
    table = re.search(re.escape(HEAD) + r"((?:\|.*\n)*)", text)
    assert table is not None, f"there is no table in {TABLE}"
    return {line.split(" | ")[0].removeprefix("| "): line for line in table[1].splitlines()}


def write(fault: Fault, line: str) -> None:
    """Puts the fault's line into the table, which has one for each of `FAULTS`, in order; lines of other faults stay."""
    text = TABLE.read_text(encoding="utf-8")
    known = lines_of(text)
    whole = {one.what: f"| {one.what} | not run since it was written | | |" for one in FAULTS.values()} | known | {fault.what: line}
    before = HEAD + "".join(f"{line}\n" for line in known.values())
    now = HEAD + "".join(f"{whole[one.what]}\n" for one in FAULTS.values())
    TABLE.write_text(text.replace(before, now), encoding="utf-8")


def main() -> None:
    from tests.support.tiny_model import save_tiny_model

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*FAULTS, []], help="some of the faults; all if none is named")
    parser.add_argument("--write", action="store_true", help="put the outcomes into the table of cluster/README.md")
    options = parser.parse_args()
    wrong = False
    for name in options.names or FAULTS:
        fault = FAULTS[name]
        with tempfile.TemporaryDirectory(prefix="faults") as folder:
            model = Path(folder) / "model"
            model.mkdir()
            save_tiny_model(model)
            try:
                line = play(fault, model, Path(folder))
            except (AssertionError, subprocess.TimeoutExpired):
                traceback.print_exc()
                wrong = True
                continue
        print(line, flush=True)
        if options.write:
            write(fault, line)
    sys.exit(wrong)


if __name__ == "__main__":
    main()
