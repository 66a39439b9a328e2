"""The figures of `check --hardware` in docs/guides/memory.md are what it says today.

`python -m tests.preflight.hardware.test_memory_guide` writes them anew.
"""

from __future__ import annotations

import re
import tempfile
from pathlib import Path
from typing import Any

import pytest

from apprentice.preflight.hardware.hardware_estimate import HardwareEstimate
from apprentice.preflight.hardware.hardware_report import report_on_hardware
from tests.conftest import ROOT
from tests.preflight.hardware.test_hardware_estimate import estimate, recipe
from tests.support.big_models import big_llama

FILE = ROOT / "docs" / "guides" / "memory.md"
GUIDE = FILE.read_text(encoding="utf-8")
EXAMPLE = re.compile(r"(?<=on `8xH100-80GB` it says:\n\n```\n).*?(?=```)", re.DOTALL)
ROWS = re.findall(r"^\| (\d+B [^|]*) \| (\S*x\S*-\S*GB) \|(.*)\|$", GUIDE, re.MULTILINE)


def scenario(words: str, folder: Path) -> Any:
    """The recipe that a row's first cell describes."""
    size, method = re.match(r"(\d+)B (\w+)", words).groups()  # type: ignore[union-attr]
    length = int(re.search(r"rows of ([\d,]+)", words)[1].replace(",", ""))  # type: ignore[index]
    stage, cpus = re.search(r"stage (\d)", words), re.search(r"(\d+) CPUs", words)
    deepspeed: dict[str, Any] = {"stage": int(stage[1]) if stage else 2}
    if "offload: cpu" in words:
        deepspeed["offload"] = "cpu"
    options: dict[str, Any] = {
        "data__packing": {"length": length},
        "training__steps": None,
        "training__tokens": 100_000_000,
        "training__deepspeed": deepspeed,
        "training__activation_checkpointing": "checkpointing" in words,
        "training__resources": {"cpus": float(cpus[1]) if cpus else 1.0},
    }
    return recipe(folder, big_llama(folder, f"{size}b"), method.lower(), **options)


def cells(made: HardwareEstimate) -> str:
    """The cells of figures of a row."""
    hours = made.hours * made.hardware.total_gpus
    figures = (
        f"{made.gpu.total / 1e9:.0f} GB",
        f"{made.host.total / 1e9:,.0f} GB",
        f"{made.step.total:.1f} s",
        f"{made.tokens_per_s:,.0f}",
        f"{made.mfu:.2f}",
        f"{hours:.0f}" if hours >= 10 else f"{hours:.1f}",
    )
    return "".join(f" {figure} |" for figure in figures).removesuffix("|")


def test_the_table_is_there() -> None:
    assert len(ROWS) == 8


@pytest.mark.parametrize(("words", "hardware", "figures"), ROWS)
def test_a_row_of_the_table(words: str, hardware: str, figures: str, tmp_path: Path) -> None:
    made = estimate(scenario(words, tmp_path), hardware)
    assert figures == cells(made)
    assert made.fits


def example(folder: Path) -> str:
    """What `check` says of a recipe that does not fit."""
    lines = report_on_hardware(scenario("8B full, rows of 8,192", folder), "8xH100-80GB").lines()
    return "".join(f"{mark:<4}{subject:<10} {text}\n" for mark, subject, text in lines) + "does not fit\n"


def test_the_example_that_does_not_fit(tmp_path: Path) -> None:
    assert EXAMPLE.findall(GUIDE) == [example(tmp_path)]


def rewrite(folder: Path) -> None:
    text = EXAMPLE.sub(lambda _: example(folder), GUIDE)
    for words, hardware, figures in ROWS:
        new = cells(estimate(scenario(words, folder), hardware))
        text = text.replace(f"| {words} | {hardware} |{figures}|", f"| {words} | {hardware} |{new}|")
    FILE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        rewrite(Path(temporary))
