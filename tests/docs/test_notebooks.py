"""The notebooks of the documentation: kept without outputs, and executed with a tiny model in place of theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.conftest import ROOT

NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
MODEL, STEPS = "smollm2-135m-instruct", '"training.steps=60"'
LONG = {"own_table_to_endpoint"}  # trains, evaluates and serves; run by hand
SHORT = '"training.steps=2", "training.optimizer.warmup_steps=1"'


def code_cells(book: Any) -> list[Any]:
    return [cell for cell in book.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_kept_without_outputs(file: Path) -> None:
    book = nbformat.read(file, as_version=4)
    nbformat.validate(book)
    assert len(code_cells(book)) >= 5
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code_cells(book))
    assert file.stat().st_size < 20_000
    assert f'MODEL = "{MODEL}"' in code_cells(book)[0].source


@pytest.mark.slow
@pytest.mark.cluster
@pytest.mark.parametrize(
    "file", [pytest.param(file, id=file.stem, marks=[pytest.mark.long] * (file.stem in LONG)) for file in NOTEBOOKS]
)
def test_a_notebook_runs(file: Path, tiny_model: Path, ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from nbclient import NotebookClient

    from apprentice.ray_cluster.session import joining_environment

    for name, value in joining_environment().items():  # the kernel, and the training that it starts, join the tests' Ray
        monkeypatch.setenv(name, value)

    book = nbformat.read(file, as_version=4)
    for cell in code_cells(book):
        cell.source = cell.source.replace(MODEL, str(tiny_model)).replace(STEPS, SHORT)
    NotebookClient(book, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = {cell.source: output_of(cell) for cell in code_cells(book)}
    if file.stem == "packed_row":
        assert "segment 1: plan position " in texts(shown, "segments.max")
        assert "srcdoc=" in texts(shown, "preview_rows")
    else:
        assert "step 2 of 2: loss " in texts(shown, "training.metrics")
        assert "<table>" in texts(shown, "run.evaluate")
        assert "http://127.0.0.1:" in texts(shown, "client.ask")


def output_of(cell: Any) -> str:
    """The text that a cell printed, and the HTML that it shows."""
    return "".join(output.get("text") or output.get("data", {}).get("text/html", "") for output in cell.outputs)


def texts(shown: dict[str, str], part: str) -> str:
    """The output of the cells whose source has `part`."""
    return "".join(output for source, output in shown.items() if part in source)
