"""The image's recipe: no known mistake, and no file that is missing."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from apprentice import __version__
from tests.conftest import ROOT

DOCKERFILE = ROOT / "cluster" / "Dockerfile"


def text() -> str:
    return DOCKERFILE.read_text(encoding="utf-8")


def test_hadolint_finds_nothing():
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(DOCKERFILE)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")


def test_hadolint_would_find_something(tmp_path):
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install ray\n")
    done = subprocess.run(
        [str(Path(sys.executable).with_name("hadolint")), str(tmp_path / "Dockerfile")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "DL3006" in done.stdout


def test_what_is_copied_exists_and_reaches_the_build():
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for line in re.findall(r"^COPY (?!--from)(.*)$", text(), re.MULTILINE) for word in line.split()[:-1]]
    assert {"src", "jobs", "serve", "constraints.txt"} <= set(copied)
    for name in copied:
        assert (ROOT / name).exists(), name
        assert name in allowed, name


def test_the_final_image_has_no_root_and_a_compiler_only_where_triton_needs_it():
    stages = dict(re.findall(r"^FROM \S+ AS (runtime-\w+)$(.*?)(?=^FROM )", text(), re.MULTILINE | re.DOTALL))
    assert set(stages) == {"runtime-cpu", "runtime-cuda"}
    assert "apt-get" not in stages["runtime-cpu"]
    packages = {"gcc", "libc6-dev", "libibverbs1", "ibverbs-providers", "libaio1"}
    assert packages <= set(stages["runtime-cuda"].split())
    final = text().rpartition("\nFROM ")[2]
    assert final.startswith("runtime-${VARIANT}\n")
    assert "apt-get" not in final
    assert re.search(r"^USER 1000$", final, re.MULTILINE)
    assert "HEALTHCHECK" in final
    assert f"apprentice:{__version__}-cpu" in text()
