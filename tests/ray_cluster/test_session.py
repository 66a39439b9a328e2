"""A local Ray session, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from apprentice.errors import ResourcesError
from apprentice.ray_cluster import session
from apprentice.ray_cluster.session import _own_folder
from tests.support.sockets import listening

SCRIPT = """
import json, os
from apprentice.ray_cluster.session import ray_session
import ray
from tests.support.sockets import listening
init = ray.init
def told(**settings):
    os.write(2, b"of ours: " + b"kept\\n")
    return init(**settings)
ray.init = told
os.umask(0o022)
with ray_session(niceness=0):
    print(ray.is_initialized(), ray.cluster_resources()["CPU"] > 2)
    niceness = ray.remote(lambda: os.getpriority(os.PRIO_PROCESS, 0)).remote()
    print(ray.get(niceness) == os.getpriority(os.PRIO_PROCESS, 0))
    node = ray._private.worker._global_node
    print(json.dumps({"sockets": listening(), "session": node.get_session_dir_path(), "token": os.environ["RAY_AUTH_MODE"]}))
print(ray.is_initialized())
"""


@pytest.mark.slow
def test_a_local_session_is_quiet_and_nobody_elses(tmp_path: Path) -> None:
    """It starts and ends without a word but what somebody else says, listens on loopback, and others can read nothing of it."""
    token = tmp_path / ".ray" / "auth_token"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
        env=environment | {"HOME": str(tmp_path)},
    )
    first, nice, message, last = done.stdout.splitlines()
    assert (first, nice, last, done.stderr) == ("True True", "True", "False", "of ours: kept\n")
    facts = json.loads(message)
    assert len({name for name, _ in facts["sockets"]}) >= 5  # the driver, GCS, raylet, agents
    assert [(name, address) for name, address in facts["sockets"] if not address.startswith("127.")] == []
    assert facts["token"] == "token"
    assert (token.stat().st_mode & 0o777, token.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    above = [folder for folder in Path(facts["session"]).parents if folder.stat().st_mode & 0o077 == 0]
    assert [folder.stat().st_uid for folder in above] == [os.getuid()]


def test_rays_folder_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    folder = _own_folder().parent
    assert (folder.parent, folder.stat().st_mode & 0o777) == (tmp_path, 0o700)
    folder.chmod(0o755)  # as if another user had made it first
    with pytest.raises(ResourcesError, match="is not a folder that you alone can read"):
        _own_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ResourcesError, match="is not a folder that you alone can read"):
        _own_folder()


def test_the_shared_cluster_listens_on_loopback_alone(ray_cluster: None) -> None:
    addresses = listening()
    assert len(addresses) >= 5
    assert [(name, address) for name, address in addresses if not address.startswith("127.")] == []


def test_a_slow_start_is_is_written_of_at_once(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    is_written = threading.Event()
    write = os.write

    def watched_write(descriptor: int, text: bytes) -> int:
        count = write(descriptor, text)
        is_written.set()
        return count

    monkeypatch.setattr(session, "SLOW_START_S", 0.0)
    monkeypatch.setattr(session.os, "write", watched_write)
    with session._filter_startup_output():
        assert is_written.wait(60)
        os.write(2, b"of Ray\n")
        assert capfd.readouterr().err.startswith("Ray is slow to start on this busy machine; it is waited for, up to 5 minutes.")
    assert capfd.readouterr().err == "of Ray\n"
