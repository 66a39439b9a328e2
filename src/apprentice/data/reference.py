"""Reference log-probabilities for DPO: what a frozen model gives to both answers of each pair, stored with the run as `.npz`."""

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
