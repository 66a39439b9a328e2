"""Sources of a parameter's values: any range of the flattened parameter, without the rest of it.

    parameter, flattened   [ r0 | r1 | r2 | r3 ]        ranks keep equal ranges
                             ▲    ▲
    files                  [ a ][ b     ][ c  ]         runs of elements that lie together in a file

Most parameters are one tensor of a file. Some architectures put several together or take one apart (experts; queries, keys and
values): where this moves whole rows, a parameter is a list of runs too. What moves single elements (a transposed matrix) is
converted whole by each process.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from apprentice.models.weights.safetensors_reader import SafetensorsReader


class ParameterSource(Protocol):
    """Gives the values of one parameter, range by range."""

    def fill(self, start: int, out: Tensor) -> None:
        """Copies the elements of the flattened parameter from `start` on into `out` (numel,), in its dtype and device."""


class FileRun(NamedTuple):
    """`numel` elements of the tensor `name` in a file, from the flattened place `start` on."""

    name: str
    start: int
    numel: int


class FileSource:
    """A parameter whose elements lie in `runs`, one after the other."""

    def __init__(self, reader: SafetensorsReader, runs: Sequence[FileRun]) -> None:
        self._reader = reader
        self._runs = runs

    def fill(self, start: int, out: Tensor) -> None:
        """Copies the range of `out`'s length from `start` on; reads those bytes and no others."""
        end, place = start + out.numel(), 0
        for name, first, numel in self._runs:
            low, high = max(start, place), min(end, place + numel)
            if low < high:
                self._reader.read_into(name, first + low - place, out[low - start : high - start])
            place += numel


class ConvertedSource:
    """A parameter that `convert` makes whole, each time a range of it is needed."""

    def __init__(self, convert: Callable[[], Tensor]) -> None:
        self._convert = convert

    def fill(self, start: int, out: Tensor) -> None:
        """Copies the range of `out`'s length from `start` on."""
        out.copy_(self._convert().flatten()[start : start + out.numel()])


class MemorySource:
    """A parameter that no file holds: `values` are those it was initialised with."""

    def __init__(self, values: Tensor) -> None:
        self._values = values

    def fill(self, start: int, out: Tensor) -> None:
        """Copies the range of `out`'s length from `start` on."""
        out.copy_(self._values.detach().flatten()[start : start + out.numel()])


def row_numbers(shapes: Sequence[Sequence[int]]) -> list[Tensor] | None:
    """For tensors of `shapes` the numbers of their rows, counted through all of them: int64, of shape (…, 1).

    What moves whole rows moves these numbers alike. None where the tensors have no rows of equal length.
    """
    if any(len(shape) < 2 or shape[-1] != shapes[0][-1] for shape in shapes):
        return None
    numbers, first = [], 0
    for shape in shapes:
        rows = math.prod(shape[:-1])
        numbers.append(torch.arange(first, first + rows).view(*shape[:-1], 1))
        first += rows
    return numbers


def runs_of_rows(moved: Tensor, names: Sequence[str], shapes: Sequence[Sequence[int]]) -> list[FileRun]:
    """The runs of a parameter that consists of the rows `moved` (int64) of the tensors `names` with `shapes`."""
    width = shapes[0][-1]
    ends = torch.tensor([math.prod(shape[:-1]) for shape in shapes]).cumsum(0)
    rows = moved.flatten()
    tensors = torch.bucketize(rows, ends, right=True)
    breaks = (rows[1:] != rows[:-1] + 1) | (tensors[1:] != tensors[:-1])
    firsts = [0, *(breaks.nonzero().flatten() + 1).tolist()]
    runs = []
    for first, last in zip(firsts, [*firsts[1:], len(rows)], strict=True):
        tensor = int(tensors[first])
        start = int(rows[first]) - (int(ends[tensor - 1]) if tensor else 0)
        runs.append(FileRun(names[tensor], start * width, (last - first) * width))
    return runs
