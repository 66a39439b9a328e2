"""What follows a running training: nothing that the screen, the network or a record does ends it."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from apprentice.errors import TrainingError
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.distributed import follower
from apprentice.train.distributed.follower import Follower, get_outcome
from apprentice.train.distributed.heartbeat import Heartbeat, WorkerProcess
from apprentice.train.distributed.mailbox import Mailbox
from apprentice.train.metrics.tracker import Tracker
from tests.train.metrics.test_tracker import record

BLIP = ray.exceptions.ActorUnavailableError("the network was away", b"\x00" * 16)
DEATH = ray.exceptions.ActorDiedError()


class Near:
    """A mailbox in this process, called as an actor is; `errors` come in place of the next answers."""

    def __init__(self, errors: list[Exception]) -> None:
        self._mailbox, self.errors = Mailbox(1), errors
        self.heard = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            given = getattr(self._mailbox, name)(*arguments)  # the call arrived, whatever becomes of its answer
            self.heard.release()
            return list(given) if isinstance(given, list) else given

        return SimpleNamespace(remote=lambda *arguments: lambda: answer(*arguments))

    def get(self, call: Any, timeout: float | None = None) -> Any:
        given = call()
        if self.errors:
            raise self.errors.pop(0)
        return given


@pytest.fixture
def near(monkeypatch: pytest.MonkeyPatch) -> Near:
    mailbox = Near([])
    monkeypatch.setattr(ray, "get", mailbox.get)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "abc"))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(follower, "POLL_S", 0.001)
    mailbox.begin_attempt.remote(None)()
    return mailbox


def written(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def follow(near: Near, tracker: Tracker, records: list[dict[str, Any]]) -> None:
    with Follower(near, tracker, 10.0):
        for one in records:
            near.add_record.remote(one)()
    tracker.close()


def tracker_for(folder: Path, progress: Any) -> Tracker:
    (folder / "run").mkdir()
    return Tracker(Run(Folder.at(folder / "run")), progress)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("a callback that is wrong"), UnicodeError()])
def test_what_shows_the_run_does_not_end_it(near: Near, error: Exception, tmp_path: Path) -> None:
    calls = []

    def shown(values: dict[str, Any]) -> None:
        calls.append(values)
        raise error

    follow(near, tracker_for(tmp_path, shown), [record(step) for step in range(1, 5)])
    assert written(tmp_path / "run") == [1, 2, 3, 4]
    assert len(calls) == 1


def test_a_record_that_cannot_be_written_costs_only_itself(near: Near, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    follow(near, tracker_for(tmp_path, seen.append), [record(1), {**record(2), "loss": 1j}, record(3)])
    assert written(tmp_path / "run") == [1, 3]
    assert [one["step"] for one in seen] == [1, 3]


def test_an_answer_that_the_network_lost_is_asked_for_again(near: Near, tmp_path: Path) -> None:
    near.errors = [BLIP, BLIP, BLIP]
    for step in (1, 2):
        near.add_record.remote(record(step))()
    follow(near, tracker_for(tmp_path, lambda values: None), [record(3)])
    assert near.errors == []
    assert written(tmp_path / "run") == [1, 2, 3]


def test_a_mailbox_that_died_is_one_sentence(near: Near, tmp_path: Path) -> None:
    near.errors = [DEATH, DEATH]
    follow(near, tracker_for(tmp_path, lambda values: None), [])
    assert len(near.errors) == 1  # the follower does not ask a dead one again
    assert isinstance(get_outcome(near).error, TrainingError)
    assert get_outcome(near).error is None


def test_a_worker_is_heard_again_after_a_blip(near: Near) -> None:
    near.errors = [BLIP, ray.exceptions.GetTimeoutError("no answer"), BLIP]
    worker = Heartbeat(near, 1, 0, timeout_s=0.05)
    for _ in range(6):
        assert near.heard.acquire(timeout=60)
    assert near.errors == []
    worker.close()


def test_a_worker_stops_where_nobody_listens(near: Near) -> None:
    near.errors = [DEATH]
    worker = Heartbeat(near, 1, 1, timeout_s=0.05)
    worker._thread.join(timeout=60)
    assert not worker._thread.is_alive()
    with pytest.raises(TrainingError, match="nobody follows this run any more; give the same command again"):
        worker.is_checkpoint_requested()


def test_a_worker_that_is_silent_is_ended(near: Near, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[WorkerProcess] = []
    gone = threading.Event()
    monkeypatch.setattr(follower, "kill_worker", lambda who: (ended.append(who), gone.set()))
    near.beat.remote(1, WorkerProcess(1, 12, "def", "10.0.0.2"))()
    near.errors = [BLIP]
    tracker = tracker_for(tmp_path, lambda values: None)
    with Follower(near, tracker, 0.01):
        assert gone.wait(60)
    tracker.close()
    assert ended == [WorkerProcess(1, 12, "def", "10.0.0.2")]
