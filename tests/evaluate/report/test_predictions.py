"""Reading a table of predictions: what is broken is scored again, and a store that does not answer is waited for."""

from __future__ import annotations

from pathlib import Path

import pytest

from apprentice import storage
from apprentice.errors import EvaluationError, MissingError, StorageError
from apprentice.evaluate.report import predictions
from apprentice.storage import Folder


def test_a_store_that_does_not_answer_is_no_broken_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whom it told to score again with --restart, it would have cost all answers."""
    folder = Folder.at(tmp_path)
    with pytest.raises(MissingError, match="does not exist"):
        predictions.read(folder)
    (folder / predictions.FILE).write_bytes(b"PAR1")
    with pytest.raises(EvaluationError, match="is not a readable Parquet file"):
        predictions.read(folder)

    def away(self: Folder) -> bytes:
        raise OSError("AWS Error SLOW_DOWN")

    monkeypatch.setattr(storage, "pause", lambda seconds: None)
    monkeypatch.setattr(Folder, "read_bytes", away)
    with pytest.raises(StorageError, match=r"does not answer \(AWS Error SLOW_DOWN\); nothing of the run is lost"):
        predictions.read(folder)
