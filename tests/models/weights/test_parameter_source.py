"""Parameters made of runs of elements in files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from apprentice.models.weights.parameter_source import (
    ConvertedSource,
    FileRun,
    FileSource,
    MemorySource,
    ParameterSource,
    row_numbers,
    runs_of_rows,
)
from apprentice.models.weights.safetensors_reader import SafetensorsReader


def ranges_of(source: ParameterSource, whole: Tensor) -> bool:
    """Whether every range of the source is that of `whole`."""
    size = whole.numel()
    for start in range(size + 1):
        for end in range(start, size + 1):
            out = torch.full((end - start,), -1.0)
            source.fill(start, out)
            if not torch.equal(out, whole.flatten()[start:end]):
                return False
    return True


@pytest.fixture
def reader(tmp_path: Path) -> SafetensorsReader:
    save_file(
        {"a": torch.arange(8.0).view(4, 2), "b": torch.arange(8.0, 14.0).view(3, 2)},
        tmp_path / "model.safetensors",
    )
    return SafetensorsReader([tmp_path / "model.safetensors"])


def test_runs_are_put_together(reader: SafetensorsReader) -> None:
    source = FileSource(reader, [FileRun("b", 2, 2), FileRun("a", 0, 4), FileRun("b", 0, 2)])
    assert ranges_of(source, torch.tensor([10.0, 11.0, 0.0, 1.0, 2.0, 3.0, 8.0, 9.0]))


def test_only_what_is_wanted_is_read(reader: SafetensorsReader) -> None:
    FileSource(reader, [FileRun("a", 0, 8), FileRun("b", 0, 6)]).fill(7, torch.zeros(3))
    assert reader.bytes_read == 12


def test_what_is_converted_and_what_is_in_memory() -> None:
    values = torch.arange(6.0).view(2, 3)
    assert ranges_of(ConvertedSource(lambda: values.T), values.T)
    assert ranges_of(MemorySource(values), values)


def test_moved_rows_become_runs(reader: SafetensorsReader) -> None:
    shapes = [(4, 2), (3, 2)]
    numbers = row_numbers(shapes)
    assert numbers is not None
    moved = torch.cat([numbers[1], numbers[0][2:], numbers[0][:1]])
    runs = runs_of_rows(moved, ["a", "b"], shapes)
    assert runs == [FileRun("b", 0, 6), FileRun("a", 4, 4), FileRun("a", 0, 2)]
    assert ranges_of(FileSource(reader, runs), torch.tensor([8.0, 9, 10, 11, 12, 13, 4, 5, 6, 7, 0, 1]))


def test_neighbours_in_two_files_are_two_runs() -> None:
    shapes = [(2, 3), (2, 3)]
    numbers = row_numbers(shapes)
    assert numbers is not None
    assert runs_of_rows(torch.cat(numbers), ["a", "b"], shapes) == [FileRun("a", 0, 6), FileRun("b", 0, 6)]


@pytest.mark.parametrize("shapes", [[(4,)], [(4, 2), (4, 3)]])
def test_tensors_without_equal_rows(shapes: list[tuple[int, ...]]) -> None:
    assert row_numbers(shapes) is None
