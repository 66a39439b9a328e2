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


class LocalMailbox:
    """A mailbox in this process, called as an actor is; `errors` come in place of the next answers."""

    def __init__(self, errors: list[Exception]) -> None:
        self._mailbox, self.errors = Mailbox(1), errors
        self.calls = threading.Semaphore(0)

    def __getattr__(self, name: str) -> Any:
        def answer(*arguments: Any) -> Any:
            result = getattr(self._mailbox, name)(*arguments)  # the call arrived, whatever becomes of its answer
            self.calls.release()
            return list(result) if isinstance(result, list) else result

        return SimpleNamespace(remote=lambda *arguments: lambda: answer(*arguments))

    def get(self, call: Any, timeout: float | None = None) -> Any:
        result = call()
        if self.errors:
            raise self.errors.pop(0)
        return result


@pytest.fixture
def local_mailbox(monkeypatch: pytest.MonkeyPatch) -> LocalMailbox:
    mailbox = LocalMailbox([])
    monkeypatch.setattr(ray, "get", mailbox.get)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "abc"))
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "10.0.0.1")
    monkeypatch.setattr(follower, "POLL_S", 0.001)
    mailbox.begin_attempt.remote(None)()
    return mailbox


def written_steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "steps.jsonl").read_text().splitlines()]


def follow(local_mailbox: LocalMailbox, tracker: Tracker, records: list[dict[str, Any]]) -> None:
    with Follower(local_mailbox, tracker, 10.0):
        for one in records:
            local_mailbox.add_record.remote(one)()
    tracker.close()


def make_tracker(folder: Path, progress: Any) -> Tracker:
    (folder / "run").mkdir()
    return Tracker(Run(Folder.at(folder / "run")), progress)


@pytest.mark.parametrize("error", [BrokenPipeError(32, "Broken pipe"), RuntimeError("a callback that is wrong"), UnicodeError()])
def test_what_shows_the_run_does_not_end_it(local_mailbox: LocalMailbox, error: Exception, tmp_path: Path) -> None:
    calls = []

    def progress(values: dict[str, Any]) -> None:
        calls.append(values)
        raise error

    follow(local_mailbox, make_tracker(tmp_path, progress), [record(step) for step in range(1, 5)])
    assert written_steps(tmp_path / "run") == [1, 2, 3, 4]
    assert len(calls) == 1


def test_a_record_that_cannot_be_written_costs_only_itself(local_mailbox: LocalMailbox, tmp_path: Path) -> None:
    seen: list[dict[str, Any]] = []
    follow(local_mailbox, make_tracker(tmp_path, seen.append), [record(1), {**record(2), "loss": 1j}, record(3)])
    assert written_steps(tmp_path / "run") == [1, 3]
    assert [one["step"] for one in seen] == [1, 3]


def test_an_answer_that_the_network_lost_is_asked_for_again(local_mailbox: LocalMailbox, tmp_path: Path) -> None:
    local_mailbox.errors = [BLIP, BLIP, BLIP]
    for step in (1, 2):
        local_mailbox.add_record.remote(record(step))()
    follow(local_mailbox, make_tracker(tmp_path, lambda values: None), [record(3)])
    assert local_mailbox.errors == []
    assert written_steps(tmp_path / "run") == [1, 2, 3]


def test_a_mailbox_that_died_is_one_sentence(local_mailbox: LocalMailbox, tmp_path: Path) -> None:
    local_mailbox.errors = [DEATH, DEATH]
    follow(local_mailbox, make_tracker(tmp_path, lambda values: None), [])
    assert len(local_mailbox.errors) == 1  # the follower does not ask a dead one again
    assert isinstance(get_outcome(local_mailbox).error, TrainingError)
    assert get_outcome(local_mailbox).error is None


def test_a_worker_is_heard_again_after_a_blip(local_mailbox: LocalMailbox) -> None:
    local_mailbox.errors = [BLIP, ray.exceptions.GetTimeoutError("no answer"), BLIP]
    worker = Heartbeat(local_mailbox, 1, 0, timeout_s=0.05)
    for _ in range(6):
        assert local_mailbox.calls.acquire(timeout=60)
    assert local_mailbox.errors == []
    worker.close()


def test_a_worker_stops_where_nobody_listens(local_mailbox: LocalMailbox) -> None:
    local_mailbox.errors = [DEATH]
    worker = Heartbeat(local_mailbox, 1, 1, timeout_s=0.05)
    worker._thread.join(timeout=60)
    assert not worker._thread.is_alive()
    with pytest.raises(TrainingError, match="nobody follows this run any more; give the same command again"):
        worker.is_checkpoint_requested()


def test_a_worker_that_is_silent_is_ended(local_mailbox: LocalMailbox, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[WorkerProcess] = []
    gone = threading.Event()
    monkeypatch.setattr(follower, "kill_worker", lambda who: (ended.append(who), gone.set()))
    local_mailbox.beat.remote(1, WorkerProcess(1, 12, "def", "10.0.0.2"))()
    local_mailbox.errors = [BLIP]
    tracker = make_tracker(tmp_path, lambda values: None)
    with Follower(local_mailbox, tracker, 0.01):
        assert gone.wait(60)
    tracker.close()
    assert ended == [WorkerProcess(1, 12, "def", "10.0.0.2")]
