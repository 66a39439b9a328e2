"""Runs of an earlier version, kept as test data (kept_runs/README.md): each promise about them against what that version gives."""

from __future__ import annotations

import json
import math
import tarfile
from typing import Any

import pytest

from tests.kept_runs.measure import ARCHIVE, CAPITAL, EXPECTED, FINISHED, LORA, ROUNDS, STOPPED, measure, unpack

pytestmark = pytest.mark.slow

CLOSE: dict[str, Any] = {"rel_tol": 1e-4, "abs_tol": 1e-5}  # another CPU adds in another order


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the code at hand gives, in one process for all of it: to start one takes longer than all that it does."""
    import torch.multiprocessing

    folder = unpack(tmp_path_factory.mktemp(CAPITAL))
    torch.multiprocessing.spawn(measure, (str(folder), str(folder / "found.json")), nprocs=1)
    return json.loads((folder / "found.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def expected() -> Any:
    return json.loads(EXPECTED.read_text(encoding="utf-8"))


def part(figures: Any, name: str, look: str) -> Any:
    assert "error" not in figures[name][look], figures[name][look]["error"]
    return figures[name][look]


def is_close(one: Any, other: Any) -> bool:
    """Equal; numbers that are not whole nearly so."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(is_close(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(is_close, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return math.isclose(one, other, **CLOSE)
    return bool(one == other)


@pytest.mark.parametrize("name", [STOPPED, ROUNDS])
def test_it_resumes_with_the_same_rows(name: str, figures: Any, expected: Any) -> None:
    now, then = part(figures, name, "resumed"), expected[name]["resumed"]
    for what in ("from", "trained_rows", "rejects", "rows"):
        assert now[what] == then[what], what
    assert len(set(then["rows"])) >= 8


@pytest.mark.parametrize("name", [STOPPED, ROUNDS])
def test_it_resumes_with_the_same_losses(name: str, figures: Any, expected: Any) -> None:
    now, then = part(figures, name, "resumed"), expected[name]["resumed"]
    assert [step["step"] for step in now["steps"]] == ([5, 6, 7, 8] if name == STOPPED else [4])
    assert is_close(now["steps"], then["steps"]), now["steps"]
    assert is_close(now["validation"], then["validation"])


def test_what_is_expected_is_what_an_undisturbed_run_did(expected: Any) -> None:
    """`finished` has the recipe of `stopped`, and was made by workers of a cluster."""
    with tarfile.open(ARCHIVE) as archive:
        lines = archive.extractfile(f"runs/{FINISHED}/steps.jsonl").read().splitlines()  # type: ignore[union-attr]
    made = {record["step"]: record for record in map(json.loads, lines) if "loss" in record}
    for step in expected[STOPPED]["resumed"]["steps"]:
        assert is_close(step, {name: made[step["step"]][name] for name in step})


@pytest.mark.parametrize("name", [FINISHED, LORA])
def test_it_evaluates_to_the_same_numbers(name: str, figures: Any, expected: Any) -> None:
    now, then = part(figures, name, "answers"), expected[name]["answers"]
    assert now.keys() == then.keys()
    for question, answer in then.items():
        assert is_close(now[question], answer), (question, now[question], answer)
    assert {answer["score"] for answer in then.values()} >= {0.0, 100.0}


@pytest.mark.parametrize("name", [FINISHED, LORA])
def test_it_exports_the_same(name: str, figures: Any, expected: Any) -> None:
    now, then = dict(part(figures, name, "exported")), dict(expected[name]["exported"])
    assert now.pop("apart") < 1e-6  # a merged adapter is a product, which another CPU may round otherwise
    if name == LORA:
        now.pop("same")
    assert now == {key: then[key] for key in now}


@pytest.mark.parametrize("name", [FINISHED, LORA])
def test_it_is_served_with_the_same_ids(name: str, figures: Any, expected: Any) -> None:
    assert part(figures, name, "served") == expected[name]["served"]
