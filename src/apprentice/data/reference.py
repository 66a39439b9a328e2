"""Log-probabilities of frozen models, stored with the run as `.npz`: a reference's of answers, and a teacher's of tokens."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apprentice.data.sampling.permutation import Numbers
from apprentice.errors import DataError
from apprentice.storage import Folder


@dataclass(frozen=True, eq=False)
class ReferenceLogProbs:
    """The reference log-probabilities of one task."""

    rows: Numbers  # (rows,) row numbers in the task's training source, ascending
    values: NDArray[np.float32]  # (rows, 2): of the better and of the worse answer

    def of(self, row: int) -> tuple[float, float]:
        """(better, worse) of one source row. Raises `DataError` if the row has no values."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise DataError(f"the run's folder `reference` says nothing of row {row}; delete it, and train again.")
        better, worse = self.values[place].tolist()
        return better, worse

    def write(self, file: Folder) -> None:
        """Writes the arrays as `.npz`."""
        stream = io.BytesIO()
        np.savez(stream, rows=self.rows, values=self.values)
        file.write_bytes(stream.getvalue())

    @classmethod
    def read(cls, file: Folder) -> ReferenceLogProbs:
        """The arrays that `write` wrote."""
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return cls(arrays["rows"], arrays["values"])


@dataclass(frozen=True, eq=False)
class TeacherLogProbs:
    """A teacher's likeliest k tokens at each target token of one task's rows, for distillation."""

    rows: Numbers  # (rows,) row numbers in the task's training source, ascending
    ends: Numbers  # (rows,) number of targets of the rows up to each one, its own included
    ids: NDArray[np.int32]  # (targets, k)
    values: NDArray[np.float32]  # (targets, k + 1): log-probabilities of these tokens, and that of all others together

    def of(self, row: int) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
        """The (ids, values) of one source row. Raises `DataError` if the row has none."""
        place = int(np.searchsorted(self.rows, row))
        if place == len(self.rows) or self.rows[place] != row:
            raise DataError(f"the run's folder `reference` says nothing of row {row}; delete it, and train again.")
        part = slice(int(self.ends[place - 1]) if place else 0, int(self.ends[place]))
        return self.ids[part], self.values[part]

    def write(self, file: Folder) -> None:
        """Writes the arrays as `.npz`."""
        stream = io.BytesIO()
        np.savez(stream, rows=self.rows, ends=self.ends, ids=self.ids, values=self.values)
        file.write_bytes(stream.getvalue())

    @classmethod
    def read(cls, file: Folder) -> TeacherLogProbs:
        """The arrays that `write` wrote."""
        with np.load(io.BytesIO(file.read_bytes()), allow_pickle=False) as arrays:
            return cls(arrays["rows"], arrays["ends"], arrays["ids"], arrays["values"])
