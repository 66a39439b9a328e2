"""Bounds of the sequences in a micro-batch, for attention that runs over its rows laid end to end or example by example.

They are made on the host, where the rows come from, so that no layer has to ask a GPU how long its sequences are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def copy_to(tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`. A copy to a GPU is only queued; pinned memory, from which it is made, stays until it is done."""
    if device.type != "cuda" or tensor.device.type != "cpu":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class ExampleSizes(NamedTuple):
    """Tokens of each example in an encoder-decoder's rows, on the host: for each row those of its examples, then of its padding.

    Segments [1 1 2 0] with answers [1 2 2 0 0] give prompts ((2, 1, 1),) and answers ((1, 2, 2),).
    """

    prompts: tuple[tuple[int, ...], ...]
    answers: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, segments: NDArray[Any], answer_segments: NDArray[Any]) -> ExampleSizes:
        """From the segments of both sides, (rows, length) and (rows, answer length); 0 is padding, at the end of a row."""
        counts = np.maximum(segments.max(axis=1, initial=0), answer_segments.max(axis=1, initial=0)).tolist()
        return cls(*(tuple(map(_sizes, side, counts)) for side in (segments, answer_segments)))

    @classmethod
    def of_one_example(cls, prompt: Tensor, answer: Tensor) -> ExampleSizes:
        """Those of rows (rows, length) that hold one example each and no padding."""
        return cls(*(((side.shape[1], 0),) * len(side) for side in (prompt, answer)))

    @property
    def is_packed(self) -> bool:
        """Whether some row holds several examples."""
        return any(len(row) > 2 for row in self.prompts)

    def to(self, _: torch.device) -> ExampleSizes:
        """The same: sizes stay on the host."""
        return self

    def keywords(self) -> dict[str, Any]:
        """The sizes as keyword arguments of `t5_segment_attention`."""
        return {"prompt_sizes": self.prompts, "answer_sizes": self.answers}


def _sizes(segments: NDArray[Any], count: int) -> tuple[int, ...]:
    padding, *sizes = np.bincount(segments, minlength=count + 1).tolist()
    return (*sizes, padding)


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

    def padded(self, longest: int) -> SequenceBounds:
        """The same with empty sequences at the end, so that their number is a power of two, and `longest`, which may be more."""
        sequences = len(self.starts) - 1
        empty = (1 << (sequences - 1).bit_length()) - sequences
        return SequenceBounds(torch.cat([self.starts, self.starts[-1:].expand(empty)]), longest)

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
        return SequenceBounds(copy_to(self.starts, device), self.longest)

    def keywords(self) -> dict[str, Any]:
        """The bounds as transformers' keyword arguments for flash attention, which `varlen_attention` takes as well."""
        of_keys = {"cu_seq_lens_k": self.starts, "max_length_k": self.longest}
        return {"cu_seq_lens_q": self.starts, "max_length_q": self.longest} | of_keys
