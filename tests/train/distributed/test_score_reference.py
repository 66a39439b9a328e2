"""What frozen models have read, as it is kept: of a task without a row that fits, too."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from apprentice.storage import Folder
from apprentice.train.distributed import score_reference


def kept_file(monkeypatch: pytest.MonkeyPatch, folder: Folder, table: pa.Table) -> None:
    file = folder / "task.npz"
    monkeypatch.setattr(score_reference, "_files", lambda *_: {"task": file})
    monkeypatch.setattr(score_reference, "_compute_missing", lambda *_: iter([(file, table)]))


@pytest.mark.parametrize("rows", [0, 2])
def test_references_are_kept_of_any_number_of_rows(rows: int, monkeypatch, tmp_path) -> None:
    values = pa.array([[-1.0, -2.0]] * rows, pa.list_(pa.float32()))
    kept_file(monkeypatch, Folder.at(str(tmp_path)), pa.table({"row": np.arange(rows), "values": values}))
    kept = score_reference.compute_references(*(None,) * 4)["task"]  # type: ignore[arg-type]
    assert (len(kept.rows), kept.values.shape) == (rows, (rows, 2))


@pytest.mark.parametrize("rows", [0, 2])
def test_a_teacher_is_kept_of_any_number_of_rows(rows: int, monkeypatch, tmp_path) -> None:
    columns = {"row": np.arange(rows), "targets": np.full(rows, 3)}
    ids, values = pa.array([[7] * 6] * rows, pa.list_(pa.int32())), pa.array([[-1.0] * 9] * rows, pa.list_(pa.float32()))
    kept_file(monkeypatch, Folder.at(str(tmp_path)), pa.table(columns | {"ids": ids, "values": values}))
    kept = score_reference.compute_teacher(*(None,) * 4)["task"]  # type: ignore[arg-type]
    assert (len(kept.ids), len(kept.values)) == (3 * rows, 3 * rows)
    if rows:
        assert [part.shape for part in kept.of(1)] == [(3, 2), (3, 3)]
