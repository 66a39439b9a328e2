"""Connection to Ray: to the cluster that `RAY_ADDRESS` or a Ray job names, or else to a local Ray that ends with the session."""

from __future__ import annotations

import logging
import os
import stat
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
import ray.data  # sets its loggers up anew on import, so it must come before quiet()

from apprentice.errors import ResourcesError
from apprentice.ray_cluster.compat import loopback_only, patient_start
from apprentice.ray_cluster.process_priority import NICENESS

# Environment that turns off third-party messages of no use to the user; set before workers start, so that they inherit it.
QUIET = {
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",  # errors of Ray's core reach us as exceptions too
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "DS_LOG_LEVEL": "error",
    "GLOO_LOG_LEVEL": "ERROR",
}
LOCAL_RAY_VARIABLE = "APPRENTICE_LOCAL_RAY"  # environment variable: the address of another process's local Ray, to be joined
VERSION_VARIABLE = "APPRENTICE_VERSION"  # environment variable: the version of apprentice that submitted a job
SLOW_START_S = 30.0  # after which a start of Ray is told of
START_TIMEOUT_S = 300  # for each process of a local Ray; with Ray's own 30 s, a busy machine would start none
SLOW_START = f"Ray is slow to start on this busy machine; it is waited for, up to {START_TIMEOUT_S // 60} minutes.\n"
SPARE_CPUS = 2  # logical CPUs of a local session beside the machine's own, for the light processes next to training


def quiet() -> None:
    """Turns third-party progress bars, warnings and information messages off in this process and those it starts."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore")
    for name in ("ray", "ray.data", "ray.train", "ray.serve", "ray.tune", "transformers", "deepspeed", "httpx", "filelock"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _filter_startup_output() -> Iterator[None]:
    """Holds standard error back while Ray starts, and prints it at the end without Ray's lines about its log level.

    A start that takes long is told of at once, after `SLOW_START_S` seconds.
    """
    sys.stderr.flush()
    screen = os.dup(2)
    slow_start = threading.Timer(SLOW_START_S, os.write, (screen, SLOW_START.encode()))
    slow_start.daemon = True
    with tempfile.TemporaryFile() as output:
        os.dup2(output.fileno(), 2)
        slow_start.start()
        try:
            yield
        finally:
            slow_start.cancel()
            slow_start.join()
            sys.stderr.flush()
            os.dup2(screen, 2)
            os.close(screen)
            output.seek(0)
            os.write(2, b"".join(line for line in output if b"RAY_BACKEND_LOG_LEVEL" not in line))


def _connect(niceness: int | None) -> None:
    if niceness is not None:
        os.environ.setdefault(NICENESS, str(niceness))
    if os.environ.get("RAY_ADDRESS"):
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
        return
    if address := os.environ.get(LOCAL_RAY_VARIABLE):
        with loopback_only():  # else Ray looks for it at the machine's other address
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
        return
    cpus = len(os.sched_getaffinity(0)) + SPARE_CPUS
    os.environ.setdefault("RAY_worker_maximum_startup_concurrency", str(cpus))  # Ray warns of many processes, and counts only cores
    start_local_ray(cpus, logging_level=logging.ERROR)


def start_local_ray(cpus: int, **settings: Any) -> None:
    """Starts a Ray for this machine and this user only: it listens on loopback, and other users can read neither its token nor its
    session files. `settings` are passed on to `ray.init`.
    """
    for library in ("GLOO", "NCCL"):  # between the workers of a training
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    _close_token()
    with loopback_only(), patient_start(START_TIMEOUT_S):
        ray.init(
            **{"_temp_dir": str(_own_folder()), **settings},
            address="local",
            num_cpus=cpus,
            include_dashboard=False,
            log_to_driver=False,
        )
    _close_token()


def _close_token() -> None:
    """Makes Ray's token file readable by this user only, because Ray writes it with whatever the umask allows."""
    file = Path.home() / ".ray" / "auth_token"
    file.parent.mkdir(mode=0o700, exist_ok=True)
    if file.is_file() and file.stat().st_mode & 0o077:
        file.chmod(0o600)


def _own_folder() -> Path:
    """Folder for Ray's sessions, inside one that only this user can read, because Ray opens its own to everybody (0777).

    Raises `ResourcesError` where another user owns the outer folder or can read it.
    """
    folder = Path(os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()) / f"apprentice-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise ResourcesError(f"{folder} is not a folder that you alone can read; remove it, or name another place in RAY_TMPDIR.")
    return folder / "ray"


def is_connected() -> bool:
    """Whether this process is connected to Ray."""
    return bool(ray.is_initialized())


def joining_environment() -> dict[str, str]:
    """The environment with which another process of this machine joins the Ray that this one is connected to; empty without one."""
    if not is_connected():
        return {}
    address = str(ray.get_runtime_context().gcs_address)
    return {LOCAL_RAY_VARIABLE if address.startswith("127.0.0.1:") else "RAY_ADDRESS": address}


@contextmanager
def ray_session(niceness: int | None = None) -> Iterator[None]:
    """Connects to Ray for a `with` block; a local Ray is shut down at its end, an existing cluster is only disconnected from.

    Does nothing where Ray is connected already. `niceness` is that of a local session's workers, unless the environment sets
    `RAY_worker_niceness` (Ray's default: 15). Raises `ResourcesError` where Ray does not start.
    """
    if is_connected():
        yield
        return
    quiet()
    # Workers compile DeepSpeed's small op with the ninja of this environment.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep):
        os.environ["PATH"] = os.pathsep.join([scripts, os.environ.get("PATH", "")])
    try:
        with _filter_startup_output():
            _connect(niceness)
    except Exception as error:  # Ray raises exceptions of many types here
        raise ResourcesError(
            f"Ray did not start: {' '.join(str(error).split())} Look for a full disk or a busy machine."
        ) from error
    quiet()  # ray.init sets its own loggers up anew
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        yield
    finally:
        ray.shutdown()
