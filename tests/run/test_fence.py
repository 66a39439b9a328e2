"""Who may write to a run: one at a time, the dead are taken over, and what the overtaken write does not count."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from apprentice.run import fence
from apprentice.run.fence import (
    EXPIRY_S,
    FencedError,
    FenceLog,
    FenceToken,
    Holder,
    Lease,
    committed_checkpoints,
    lease_run,
    wait_until_free,
)
from apprentice.storage import Folder
from tests.support.object_store import BUCKET, ObjectStore, object_store


class Clock:
    """A clock that waiting moves on; `meanwhile` happens in each wait."""

    def __init__(self) -> None:
        self.now = 0.0
        self.meanwhile: list[object] = []

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds
        if self.meanwhile:
            step = self.meanwhile.pop(0)
            assert callable(step)
            step()


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    with object_store() as bucket:
        yield bucket


@pytest.fixture(params=["disk", "s3"])
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Folder:
    folder = Folder.at(tmp_path / "runs" / "tiny")
    if request.param == "s3":
        for name, value in request.getfixturevalue("store").environment.items():
            monkeypatch.setenv(name, value)
        folder = Folder.at(f"s3://{BUCKET}/{tmp_path.name}/tiny")
    (folder / "recipe.yaml").write_text("")
    return folder


@pytest.fixture
def disk(tmp_path: Path) -> Folder:
    folder = Folder.at(tmp_path / "runs" / "tiny").make()
    (folder / "recipe.yaml").write_text("")
    return folder


ELSEWHERE = Holder("train", "node-b", 12, "another machine", "1", "raysubmit_7", "2026-11-30 10:00:00 UTC")


def taken(run: Folder, holder: Holder = ELSEWHERE) -> FenceToken:
    """As a process on another machine takes it, which then does nothing."""
    return FenceToken(run, fence._take(FenceLog(run), holder, lambda _: None, lambda: 0.0, lambda _: None).number)


def test_create_only_where_nothing_lies(run: Folder) -> None:
    file = run / "fence" / "000001.json"
    with ThreadPoolExecutor(8) as threads:
        won = list(threads.map(lambda number: file.create(str(number).encode()), range(8)))
    assert sum(won) == 1
    assert file.read_text() == str(won.index(True))
    assert [child.name for child in (run / "fence").children()] == ["000001.json"]


def test_without_links_the_file_is_created_all_the_same(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    assert (disk / "a").create(b"1")
    assert not (disk / "a").create(b"2")
    assert [child.name for child in disk.children()] == ["a", "recipe.yaml"]


def test_one_holds_it_and_the_next_may_after_that(run: Folder) -> None:
    with lease_run(run, "train") as lease:
        assert lease.is_held()
        with lease_run(run, "train") as again:  # the same process
            assert again is lease
        entry = FenceLog(run).last()
        assert entry is not None
        assert (entry.attempt, entry.released, entry.holder.pid) == (1, False, os.getpid())
    entry = FenceLog(run).last()
    assert entry is not None
    assert (entry.number, entry.released) == (2, True)
    with lease_run(run, "train") as lease:  # which waits for nothing
        assert lease.token.attempt == 3
    assert [child.name for child in (run / "fence").children()] == [f"00000{number}.json" for number in range(1, 5)]


def test_a_second_is_told_who_holds_it(run: Folder) -> None:
    token, clock = taken(run), Clock()
    clock.meanwhile = [lambda: None, lambda: (run / "fence" / f"beat-{token.attempt:06d}").write_text("1")]
    with pytest.raises(FencedError) as caught, lease_run(run, "train", clock=clock, wait=clock.wait):
        pass
    assert str(caught.value) == (
        "run 'tiny' is held by `train` (process 12 on node-b, job raysubmit_7) since 2026-11-30 10:00:00 UTC; two at once would"
        " spoil it. Wait for its end, or stop it with `ray job stop raysubmit_7` and give the same command again: it is taken over"
        " when no sign of life has come for 60 seconds."
    )
    assert clock.now == 2.0


def test_a_counter_that_stands_still_is_taken_over(run: Folder) -> None:
    first, clock, messages = taken(run), Clock(), list[str]()
    with lease_run(run, "train", clock=clock, wait=clock.wait, tell=messages.append) as lease:
        assert clock.now == EXPIRY_S
        assert messages == [f"{ELSEWHERE} holds the run and gives no sign of life; it is taken over in 50 seconds"]
        assert lease.token.attempt == 2
        with pytest.raises(
            FencedError, match=rf"run 'tiny' has been taken over by `train` \(process {os.getpid()} on .*follow that one"
        ):
            first.check()


def test_who_cannot_look_has_seen_nothing_stand_still(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    taken(disk)
    clock = Clock()
    real = FenceLog.beat

    def away(self: FenceLog, attempt: int) -> bytes:
        if clock.now == EXPIRY_S - 1:
            raise fence.StorageError("away")
        return real(self, attempt)

    monkeypatch.setattr(FenceLog, "beat", away)
    assert wait_until_free(disk, clock=clock, wait=clock.wait) is not None
    assert clock.now == 2 * EXPIRY_S - 1


def test_a_process_of_this_machine_that_is_gone_is_taken_over_at_once(disk: Folder) -> None:
    """Killed, and so without a word; its remains do not count as life, nor does another process of its number."""
    program = (
        "import sys, time\nfrom apprentice.run.fence import lease_run\nfrom apprentice.storage import Folder\n"
        "with lease_run(Folder.at(sys.argv[1]), 'train'):\n    print('held', flush=True)\n    time.sleep(600)"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(disk)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    entry = FenceLog(disk).last()
    assert entry is not None
    assert not entry.holder.is_gone
    assert replace(entry.holder, started="1").is_gone
    assert not replace(entry.holder, machine="another").is_gone
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and nobody has asked how it ended
    with lease_run(disk, "train", wait=lambda _: pytest.fail("nobody is there to wait for")) as lease:
        assert lease.token.attempt == 2
    process.wait()
    process.stdout.close()


def test_of_many_at_once_one_takes_over(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fence, "POLL_S", EXPIRY_S)
    taken(run)

    def take(number: int) -> int | None:
        clock = Clock()
        try:
            holder = replace(ELSEWHERE, pid=number)
            return fence._take(FenceLog(run), holder, lambda _: None, clock, clock.wait).number
        except FencedError:
            return None

    first = [take(0)]
    assert first == [2]
    with ThreadPoolExecutor(4) as threads:
        winners = [number for number in threads.map(take, range(1, 5)) if number is not None]
    entry = FenceLog(run).last()
    assert entry is not None
    assert len(set(winners)) == len(winners)  # one after the other, each after it saw the one before stand still
    assert entry.number == max(winners)


def test_what_an_overtaken_attempt_saves_does_not_count(run: Folder) -> None:
    first = taken(run).start_group(1)
    first.commit("step-000003.2", lambda _: True)
    assert committed_checkpoints(run) == {"step-000003.2"}
    clock = Clock()
    with lease_run(run, "train", clock=clock, wait=clock.wait) as lease:
        second = lease.token.start_group(1)
        with pytest.raises(FencedError, match="has been taken over by"):
            first.commit("step-000006.2", lambda _: True)
        with pytest.raises(FencedError, match="has been taken over by"):
            first.start_group(2)
        second.commit(f"step-000006.{second.writer}", lambda name: name != "step-000003.2")
        assert committed_checkpoints(run) == {f"step-000006.{second.writer}"}


def test_a_commit_that_is_overtaken_in_its_last_moment(run: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    first, create = taken(run), Folder.create

    def slow(self: Folder, data: bytes) -> bool:
        if b"step-000003" in data:
            with monkeypatch.context() as patch:
                patch.setattr(Folder, "create", create)
                taken(run, replace(ELSEWHERE, pid=13))
        return create(self, data)

    monkeypatch.setattr(Folder, "create", slow)
    monkeypatch.setattr(fence, "wait_until_free", lambda run, **_: FenceLog(run).last())
    with pytest.raises(FencedError, match=r"taken over by `train` \(process 13"):
        first.commit("step-000003.1", lambda _: True)
    assert committed_checkpoints(run) == set()


def test_an_answer_that_was_lost_is_no_conflict(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    token, create = taken(disk), Folder.create
    monkeypatch.setattr(Folder, "create", lambda self, data: create(self, data) and False)
    token.commit("step-000003.1", lambda _: True)
    entry = FenceLog(disk).last()
    assert entry is not None
    assert (entry.number, entry.checkpoints) == (2, ("step-000003.1",))


def test_workers_that_were_given_up_commit_nothing(disk: Folder) -> None:
    token = taken(disk)
    old, new = token.start_group(1), token.start_group(2)
    with pytest.raises(FencedError, match="other workers go on with run 'tiny'; what these wrote last does not count"):
        old.commit("step-000003.2", lambda _: True)
    with pytest.raises(FencedError, match="these do not begin"):
        token.start_group(1)
    new.commit("step-000003.3", lambda _: True)
    assert committed_checkpoints(disk) == {"step-000003.3"}


def test_who_was_away_for_a_while_asks_before_it_writes(disk: Folder) -> None:
    clock = Clock()
    entry = fence._take(FenceLog(disk), ELSEWHERE, lambda _: None, clock, clock.wait)
    lease = Lease(entry, disk, clock)
    lease.renew()
    clock.now += EXPIRY_S
    assert lease.is_held()  # and says so itself
    assert FenceLog(disk).beat(1) == b"2\n"
    clock.now += EXPIRY_S
    with lease_run(disk, "train", clock=clock, wait=clock.wait):
        assert not lease.is_held()
        last = FenceLog(disk).last()
        assert last is not None
        assert (last.attempt, last.released) == (2, False)


def test_what_a_run_of_an_earlier_version_saved_counts(disk: Folder) -> None:
    assert committed_checkpoints(disk) is None
    for name in ("step-000003", "step-000006", "step-000006.2"):
        (disk / "checkpoints" / name).make()
    with lease_run(disk, "train") as lease:
        assert lease.token.attempt == 3  # no folder has this number at its end
        assert committed_checkpoints(disk) == {"step-000003", "step-000006", "step-000006.2"}


def test_a_run_that_came_to_nothing_leaves_nothing(tmp_path: Path) -> None:
    run = Folder.at(tmp_path / "new")
    with lease_run(run, "prepare"):
        assert (run / "fence").exists()
    assert not run.exists()
    with lease_run(run, "prepare") as lease:
        run.delete()
        assert lease.is_held()
        lease.renew()
        assert not lease.is_held()
    assert not run.exists()


def test_a_first_heartbeat_that_cannot_be_written_leaves_the_run_free(disk: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    (disk / "recipe.yaml").write_text("")

    def full(self: Folder, data: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "write_bytes", full)
        with pytest.raises(OSError, match="No space left"), lease_run(disk, "train"):
            pass
    with lease_run(disk, "prepare", wait=lambda _: pytest.fail("waited for itself")):
        pass


def test_an_entry_that_was_cut_off_is_passed_over(disk: Folder) -> None:
    """As a machine that loses its power leaves it on a disk without links."""
    token = taken(disk)
    (disk / "fence" / "000002.json").write_text('{"format": 1, "num')
    token.commit("step-000003.1", lambda _: True)
    entry = FenceLog(disk).last()
    assert entry is not None
    assert (entry.number, committed_checkpoints(disk)) == (3, {"step-000003.1"})
    assert json.loads((disk / "fence" / "000003.json").read_text())["format"] == 1
