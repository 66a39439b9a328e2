"""Bounds of the sequences in a micro-batch, for attention that runs over its rows laid end to end.

They are made on the host, where the rows come from, so that no layer has to ask a GPU how long its sequences are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class SequenceBounds(NamedTuple):
    """Where sequences begin and end in the rows laid end to end: `starts`, int32 (sequences + 1,), and the `longest`'s tokens.

    Positions [0 1 2 0] and [0 1 0 1] give starts [0 3 4 6 8] and longest 3. The padding of a row is a sequence of its own. It is a
    tuple because DeepSpeed goes through what modules are given at stage 3, and warns of types that it does not know.
    """

    starts: Tensor
    longest: int

    @classmethod
    def of(cls, positions: NDArray[Any]) -> SequenceBounds:
        """From positions (rows, length), which restart at 0 with each sequence and with the padding of a row."""
        flat = positions.reshape(-1)
        starts = np.append(np.flatnonzero(flat == 0), len(flat)).astype(np.int32)
        return cls(torch.from_numpy(starts), int(np.diff(starts).max()))

    @classmethod
    def of_rows(cls, input_ids: Tensor) -> SequenceBounds:
        """Those of rows (rows, length) that hold one sequence each."""
        rows, length = input_ids.shape
        return cls(torch.arange(0, rows * length + 1, length, dtype=torch.int32, device=input_ids.device), length)

    @property
    def device(self) -> torch.device:
        """Device of `starts`."""
        return self.starts.device

    @property
    def shape(self) -> torch.Size:
        """Shape of `starts`."""
        return self.starts.shape

    def to(self, device: torch.device) -> SequenceBounds:
        """The same with `starts` on `device`."""
        return SequenceBounds(self.starts.to(device), self.longest)

    def keywords(self) -> dict[str, Any]:
        """The bounds as transformers' keyword arguments for flash attention, which `varlen_attention` takes as well."""
        of_keys = {"cu_seq_lens_k": self.starts, "max_length_k": self.longest}
        return {"cu_seq_lens_q": self.starts, "max_length_q": self.longest} | of_keys
