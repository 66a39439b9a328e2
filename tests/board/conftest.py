"""Real run folders, made by training and evaluation of an earlier version, for the board to show."""

from __future__ import annotations

import tarfile
from pathlib import Path

import pytest

ARCHIVE = Path(__file__).parents[1] / "kept_runs" / "runs.tar.gz"


@pytest.fixture
def storage(tmp_path: Path) -> Path:
    """A storage with the runs finished, lora, rounds and stopped."""
    with tarfile.open(ARCHIVE) as archive:
        members = [member for member in archive.getmembers() if member.name.startswith("runs/")]
        archive.extractall(tmp_path, members=members, filter="data")
    for file in (*tmp_path.glob("runs/*/recipe.yaml"), *tmp_path.glob("runs/*/tasks.jsonl")):
        file.write_text(file.read_text().replace("@KEPT@", str(tmp_path)))
    return tmp_path / "runs"
