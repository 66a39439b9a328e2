"""What tests share: a quiet environment, a tiny real model, one local Ray, the data folder, and no skip that nobody expected.

Heavy packages are imported inside the fixtures, so that a test of pure functions starts in a moment.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
DATA_FOLDER = ROOT.parent / "shared" / "data"
NEEDS_BFLOAT16 = "needs a CPU with products in bfloat16"
NEEDS_GPU = "needs a GPU"
NEEDS_DATA = "needs ../shared/data"
NEEDS_MOUNT = "needs root, to mount a disk"
NEEDS_VLLM = "needs the vllm environment"

# Workers inherit these, so they must stand before anything starts a process.
os.environ.update(
    HF_HUB_OFFLINE="1",  # a test that reaches for a hub fails here, not only where there is no network
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    RAY_USAGE_STATS_ENABLED="0",
)
# DeepSpeed's workers call ninja, which lies beside this Python.
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))


UNEXPECTED_SKIP = 7  # exit code


class ExpectedSkipsOnly:
    """In CI (`CI=true`) a skipped test fails the session, unless its reason is one that this machine cannot change."""

    def __init__(self) -> None:
        self.unexpected: dict[str, None] = {}  # in order; where several processes collect, each tells of a module's skip

    def _see(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if not report.skipped or hasattr(report, "wasxfail"):
            return
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reason = reason.removeprefix("Skipped: ")
        never = (NEEDS_BFLOAT16, NEEDS_GPU, NEEDS_MOUNT, NEEDS_VLLM)
        if not reason.startswith(never) and (not reason.startswith(NEEDS_DATA) or DATA_FOLDER.is_dir()):
            self.unexpected[f"{report.nodeid}: {reason}"] = None

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._see(report)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._see(report)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.unexpected and session.exitstatus in (
            pytest.ExitCode.OK,
            pytest.ExitCode.TESTS_FAILED,
            pytest.ExitCode.NO_TESTS_COLLECTED,
        ):
            session.exitstatus = UNEXPECTED_SKIP  # of its own, because `.ci/run` gives failed tests a second chance

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for line in self.unexpected:
            terminalreporter.write_line(f"UNEXPECTED SKIP {line}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("CI") == "true" and not hasattr(config, "workerinput"):  # pytest-xdist's processes report to the first one
        config.pluginmanager.register(ExpectedSkipsOnly(), "expected_skips_only")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Orders the files that pytest-xdist gives to several processes, so that these end at about the same time.

    Files whose tests take minutes and start clusters come first, then those that use the session's, then the others; of equals
    those with more tests.
    """
    if not hasattr(config, "workerinput"):
        return
    long = {item.path for item in items if item.get_closest_marker("slow") and item.get_closest_marker("cluster")}
    on_ray = {item.path for item in items if "ray_cluster" in getattr(item, "fixturenames", ())}
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.path not in long, item.path not in on_ray, -tests[item.path], item.path))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip(NEEDS_GPU)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real datasets beside the checkout: `<dataset>/<split>.parquet`."""
    if not DATA_FOLDER.is_dir():
        pytest.skip(NEEDS_DATA)
    return DATA_FOLDER


@pytest.fixture(scope="session")
def chromium() -> str:
    """The path of the browser, for `playwright.chromium.launch(executable_path=…)`."""
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("needs chromium (Debian: apt-get install chromium)")
    return browser


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny random model (`tests/support/tiny_model.py`). Do not write into it: copy it."""
    from tests.support.tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny_model")
    save_tiny_model(folder)
    return folder


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray with 4 CPUs for the whole session, apart from any other Ray on the machine."""
    import ray

    from apprentice.ray_cluster.session import start_local_ray

    session = tempfile.mkdtemp(prefix="apprentice-ray-", dir="/tmp")  # short: Unix socket paths hold 107 characters
    start_local_ray(4, configure_logging=False, object_store_memory=512 * 2**20, _temp_dir=session)
    yield
    ray.shutdown()
    shutil.rmtree(session, ignore_errors=True)
