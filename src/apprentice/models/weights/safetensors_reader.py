"""Reader of a model folder's safetensors files: headers at once, numbers by ranges of a flattened tensor.

A file is 8 bytes with the header's length, the header (JSON: name → dtype, shape, place of the bytes), then the numbers
(https://github.com/huggingface/safetensors#format). Ranges are read with ordinary reads and not mapped into memory, so that the
bytes that a process asks of the disk can be counted.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.storage import Folder

SINGLE_FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
PIECE_BYTES = 1 << 24  # read at once
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file: `start` is the place of its first byte in the file."""

    file: Path | Folder
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files with the weights in `folder`, as transformers finds them; none where there are no such files.

    Others may lie beside them, such as an adapter's. Raises `ModelError` for an index that cannot be read.
    """
    if (folder / SINGLE_FILE).is_file():
        return [folder / SINGLE_FILE]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{folder / INDEX} cannot be read ({error}); fetch or export the model again.") from error
    return [folder / name for name in sorted(names)]


def stored_weight_files(folder: Folder) -> list[Folder]:
    """All safetensors files in a folder of an object store, or of a disk."""
    return [file for file in folder.children() if file.name.endswith(".safetensors")]


def _open(file: Path | Folder) -> AbstractContextManager[Any]:
    """The file, opened to be read in any order and without a buffer."""
    if isinstance(file, Path):
        return file.open("rb", buffering=0)
    fs, path = file.filesystem()
    opened: AbstractContextManager[Any] = fs.open_input_file(path)
    return opened


def _size(file: Path | Folder) -> int:
    if isinstance(file, Path):
        return file.stat().st_size
    fs, path = file.filesystem()
    return int(fs.get_file_info(path).size)


def read_header(file: Path | Folder) -> tuple[dict[str, Any], int]:
    """The header of a safetensors file without its metadata, and the place of the first number.

    Raises `OSError` or `ValueError` for a file that is none.
    """
    with _open(file) as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise ValueError(f"{file.name} is no safetensors file")
        (size,) = struct.unpack("<Q", start)
        if size > _size(file):
            raise ValueError(f"{file.name} is no safetensors file")
        header: dict[str, Any] = json.loads(stream.read(size))
    header.pop("__metadata__", None)
    return header, 8 + size


class SafetensorsReader:
    """Reads ranges of the tensors in `files`; `bytes_read` counts the bytes of numbers, headers left out.

    Raises `ModelError` for a file that is cut off, is no safetensors file, or has numbers of an unknown format.
    """

    def __init__(self, files: Sequence[Path | Folder]) -> None:
        self.bytes_read = 0
        self._buffer = torch.empty(PIECE_BYTES, dtype=torch.uint8)  # one for all reads, so that they leave no holes in the heap
        self.entries: dict[str, TensorEntry] = {}
        for file in files:
            try:
                header, first = read_header(file)
                size = _size(file)
                for name, entry in header.items():
                    start, end = entry["data_offsets"]
                    self.entries[name] = TensorEntry(file, _DTYPES[entry["dtype"]], tuple(entry["shape"]), first + start)
                    if first + end > size:
                        raise ValueError(f"it ends before {name!r}")
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise ModelError(f"the weights in {file} cannot be read ({error}); fetch or export the model again.") from error

    def read_into(self, name: str, start: int, out: Tensor) -> None:
        """Copies the elements of tensor `name` from the flattened place `start` on into `out` (numel,), in its dtype and device."""
        entry = self.entries[name]
        buffer = self._buffer.view(entry.dtype)
        at_once = len(buffer)
        with _open(entry.file) as stream:
            stream.seek(entry.start + start * entry.dtype.itemsize)
            for first in range(0, out.numel(), at_once):
                piece = buffer[: out.numel() - first]
                data: Any = piece.view(torch.uint8).numpy()
                self._fill(stream, memoryview(data), entry.file)
                out[first : first + len(piece)].copy_(piece)

    def read(self, name: str) -> Tensor:
        """The whole tensor `name`."""
        entry = self.entries[name]
        whole = torch.empty(entry.numel, dtype=entry.dtype)
        self.read_into(name, 0, whole)
        return whole.view(entry.shape)

    def _fill(self, stream: Any, room: memoryview, file: Path | Folder) -> None:
        filled = 0
        while filled < len(room):
            count = stream.readinto(room[filled:])
            if not count:
                raise ModelError(f"the weights in {file} end early; fetch or export the model again.")
            filled += count
        self.bytes_read += filled
