"""Comparison of two commits to the last bit: what counts as a difference, and what is left out."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.checks import same_bits
from tests.conftest import ROOT


def differences(before: object, after: object) -> list[str]:
    return list(same_bits.differences_of(before, after))


def test_the_last_bit_counts() -> None:
    record = {"loss": 1.1, "counts": [1, 2], "name": "a", "none": None, "bad": math.nan}
    assert differences(record, json.loads(json.dumps(record))) == []
    (line,) = differences({"steps": [{"loss": 1.1}]}, {"steps": [{"loss": math.nextafter(1.1, 2)}]})
    assert line == "steps[0].loss: 1.1 before, 1.1000000000000003 after"
    assert differences([1], [1.0]) == ["[0]: 1 before, 1.0 after"]
    assert differences([True], [1]) == ["[0]: true before, 1 after"]


def test_what_is_missing_is_a_difference() -> None:
    assert differences({"a": 1}, {"b": 1}) == ["a: only before", "b: only after"]
    assert differences({"a": [1, 2]}, {"a": [1]}) == ["a: 2 items before, 1 after"]
    assert differences({"a": []}, {"a": {}}) == ["a: [] before, {} after"]


def test_times_and_names_made_by_chance_do_not_count() -> None:
    report = {"created": "now", "seconds": 3.0, "pools": [{"score": 50.0, "tokens_per_s": 7.0}], "id": "chatcmpl-1", "valid": 1}
    assert same_bits.without_volatile(report) == {"pools": [{"score": 50.0}], "valid": 1}
    assert same_bits.count_values({"a": [1, 2], "b": {"c": None}}) == 3


def test_a_page_is_its_texts() -> None:
    page = "<html><style>b{color:red}</style><body><pre>a &lt;b&gt;<b>\nc</b></pre> </body></html>"
    assert same_bits.page_texts(page) == ["a <b>", "\nc"]


def test_a_commit_is_unpacked_whole(tmp_path: Path) -> None:
    place = tmp_path / "code"
    place.mkdir()
    same_bits.unpack_commit("HEAD", place)
    assert (place / "src" / "apprentice" / "recipes" / "quickstart.yaml").is_file()  # through a link


@pytest.mark.long
def test_a_commit_is_the_same_as_itself() -> None:
    """Two whole runs of the commit that is checked out."""
    command = [sys.executable, "-m", "benchmarks.checks.same_bits", "HEAD", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [line["compared"] for line in lines] == ["steps", "rows", "examples", "report", "replies", "together"]
    assert all(line["same"] and line["values"] >= 16 for line in lines)
