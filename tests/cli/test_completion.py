"""Completion in the shell, as bash asks for it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from apprentice.cli.completion import complete_run
from apprentice.recipe.explain import all_keys, takes_value

PROGRAM = "import sys; sys.argv[0] = 'apprentice'; from apprentice.cli import main; main()"


def complete(words: str, folder: Path) -> list[str]:
    """What bash would offer behind `words`, the last of which is being typed."""
    environment = os.environ | {
        "_APPRENTICE_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True, cwd=folder, check=False, timeout=120
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("apprentice do", ["doctor"]),
        ("apprentice train quick", ["quickstart"]),
        ("apprentice train quickstart training.optimizer.sc", ["training.optimizer.schedule="]),
        ("apprentice train quickstart tuning.method=p", ["tuning.method=prefix", "tuning.method=prompt"]),
        ("apprentice export my-", ["my-run"]),
        ("apprentice recipe serving.p", ["serving.port"]),
    ],
)
def test_bash_completes(words: str, offers: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "my-run"
    run.mkdir(parents=True)
    (run / "identity.json").write_text("{}")
    (tmp_path / "runs" / "cache").mkdir()
    assert [offer for offer in complete(words, tmp_path) if not offer.startswith("serving.promp")] == offers


@pytest.mark.parametrize(("incomplete", "offers"), [("", ["a-run", "b[1]"]), ("b[", ["b[1]"]), ("/home/", []), ("../", [])])
def test_runs_are_completed_whatever_is_typed(incomplete: str, offers: list[str], tmp_path: Path) -> None:
    for name in ("a-run", "b[1]"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "identity.json").write_text("{}")
    context: Any = SimpleNamespace(params={"storage": str(tmp_path)})
    assert complete_run(context, incomplete) == offers


def test_a_block_takes_no_value() -> None:
    keys = {key for key in all_keys() if takes_value(key)}
    assert "training.workers" in keys
    assert "training.optimizer" not in keys
