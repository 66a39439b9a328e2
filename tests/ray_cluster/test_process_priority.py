"""A replica on a machine with other work: its priority, and whether its threads spin."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apprentice.ray_cluster import process_priority
from apprentice.ray_cluster.process_priority import NICENESS, SPINS, count_busy_threads, limit_thread_spinning, raise_priority


def test_a_replica_is_no_nicer_than_it_was_told(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    changed: list[tuple[int, int]] = []
    monkeypatch.delenv(NICENESS, raising=False)
    monkeypatch.setattr(process_priority.os, "getpriority", lambda *_: 15)
    monkeypatch.setattr(process_priority.os, "setpriority", lambda _, thread, niceness: changed.append((thread, niceness)))
    raise_priority()
    assert (threading.get_native_id(), 0) in changed
    assert len(changed) == len({thread for thread, _ in changed}) >= threading.active_count()
    changed.clear()
    monkeypatch.setenv(NICENESS, "15")
    raise_priority()
    assert changed == []

    def denied(*_: int) -> None:
        raise PermissionError

    monkeypatch.delenv(NICENESS)
    monkeypatch.setattr(process_priority.os, "setpriority", denied)
    raise_priority()
    assert "runs at niceness 15, behind all other work; start Ray's nodes with RAY_worker_niceness=0" in caplog.text


@pytest.mark.parametrize(
    ("running", "environment", "expected"),
    [
        ([1, 1, 1], {}, None),  # ourselves alone
        ([5, 1, 4], {}, None),  # a burst
        ([3, 4, 3], {}, "1000"),  # two busy neighbours
        ([3, 4, 3], {"OMP_WAIT_POLICY": "ACTIVE"}, None),
        ([3, 4, 3], {SPINS: "7"}, "7"),
        ([], {}, None),  # a system that does not say
    ],
)
def test_threads_spin_little_where_others_want_the_cpus(
    running: list[int], environment: dict[str, str], expected: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = list(running)
    load = tmp_path / "loadavg"

    def next_sample(*_: float) -> None:
        load.write_text(f"9.10 8.20 7.30 {left.pop(0)}/812 4711\n")

    if left:
        next_sample()
    monkeypatch.setattr(process_priority, "_LOAD", load)
    monkeypatch.setattr(process_priority, "_SAMPLES", max(1, len(running)))
    monkeypatch.setattr(process_priority.time, "sleep", next_sample)
    monkeypatch.setattr(process_priority.os, "cpu_count", lambda: 2)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    for name in (SPINS, "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    limit_thread_spinning(2)
    assert os.environ.get(SPINS) == expected


def test_the_system_says_how_many_run() -> None:
    assert count_busy_threads() >= 0


@pytest.mark.slow
def test_pytorchs_openmp_knows_the_variable() -> None:
    environment = os.environ | {SPINS: "1000", "OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", "import torch"], env=environment, capture_output=True, text=True, check=True)
    assert f"{SPINS} = '1000'" in done.stderr
