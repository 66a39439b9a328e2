"""Index of a checkpoint's tensors: which bytes of which file hold which elements, and where the digests of these bytes are.

    index.json  {"format": 2,
                 "files":   [{"name": "tensors-0000-00.safetensors", "bytes": 1200, "digests": "<sha256 of its .sha256 file>"}, …],
                 "tensors": {"weight/a": {"shape": [3, 4], "dtype": "float32", "parts": [[0, 0, 6, 128, 64, 0], …]}, …}}

A part is [number of the file, first element, elements, first byte, bytes of a piece, number of its first digest]. It is cut into
pieces of at most `PIECE_BYTES` (the last is shorter), each with a SHA-256 digest of its own, so that any range of elements can be
read and verified without the rest. The digests of a file, 32 bytes each and in its order, are in `<file>.sha256`.

Checkpoints of format 1 have no index: whole tensors in safetensors files, each file with one digest. The headers of these files are
read as an index whose parts have no pieces.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch

from apprentice.errors import StorageError

FORMAT = 2
DIGEST_BYTES = 32
PIECE_BYTES = 1 << 26  # at most; also the most that is read or hashed at once
LEAST_PIECE_BYTES = 1 << 12
PIECES = 16  # of a part, where neither limit applies: a range's ends cost at most two sixteenths of the part
# Safetensors' names of number formats.
SAFETENSORS_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in SAFETENSORS_NAMES.items()}


def piece_bytes(nbytes: int) -> int:
    """Bytes of a piece of a part of `nbytes` bytes: a multiple of 64, so that no element is cut."""
    size = min(PIECE_BYTES, max(LEAST_PIECE_BYTES, -(-nbytes // PIECES)))
    return -(-size // 64) * 64


class TensorPart(NamedTuple):
    """`numel` elements of a flattened tensor from `start` on, at byte `offset` of `file`."""

    file: str
    start: int
    numel: int
    offset: int
    piece: int  # bytes of a piece; 0 in a file that was verified whole
    first_digest: int  # number of the first piece's digest among those of `file`


@dataclass(frozen=True)
class SavedTensor:
    """A tensor's shape, number format and parts, in order."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    parts: tuple[TensorPart, ...]


@dataclass(frozen=True)
class ShardFile:
    """A file of tensor parts: its size, and the SHA-256 of the file with its digests."""

    name: str
    bytes: int
    digests: str

    @property
    def digests_file(self) -> str:
        """Name of the file with its digests."""
        return f"{self.name}.sha256"


@dataclass(frozen=True)
class ShardIndex:
    """The tensors of a checkpoint by key, and the files that hold them."""

    tensors: Mapping[str, SavedTensor]
    files: Sequence[ShardFile]

    @classmethod
    def join(cls, indices: Iterable[ShardIndex]) -> ShardIndex:
        """The index of what several workers wrote. Raises `StorageError` unless the parts of every tensor give all of it once."""
        tensors: dict[str, SavedTensor] = {}
        files: list[ShardFile] = []
        for index in indices:
            files += index.files
            for key, entry in index.tensors.items():
                known = tensors.setdefault(key, SavedTensor(entry.shape, entry.dtype, ()))
                if (known.shape, known.dtype) != (entry.shape, entry.dtype):
                    raise StorageError(f"two workers hold {key!r} in different shapes or number formats; this is a defect")
                tensors[key] = SavedTensor(known.shape, known.dtype, known.parts + entry.parts)
        for key, entry in tensors.items():
            parts = tuple(sorted((part for part in entry.parts if part.numel), key=lambda part: part.start))
            end = 0
            for part in parts:
                end = end + part.numel if part.start == end else -1
            if end != math.prod(entry.shape):
                raise StorageError(f"the workers do not hold all of {key!r} once; this is a defect")
            tensors[key] = SavedTensor(entry.shape, entry.dtype, parts)
        return cls(tensors, files)

    def to_json(self) -> dict[str, Any]:
        """The index as the content of its file."""
        numbers = {file.name: number for number, file in enumerate(self.files)}
        tensors = {
            key: {
                "shape": list(entry.shape),
                "dtype": str(entry.dtype).removeprefix("torch."),
                "parts": [[numbers[part.file], *part[1:]] for part in entry.parts],
            }
            for key, entry in self.tensors.items()
        }
        return {"format": FORMAT, "files": [asdict(file) for file in self.files], "tensors": tensors}

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> ShardIndex:
        """The index in a file's content. Raises `StorageError` for a later format."""
        if value["format"] != FORMAT:
            raise StorageError(
                f"a checkpoint is of format {value['format']}, and this version reads {FORMAT} at most; use the one that wrote it."
            )
        files = [ShardFile(**file) for file in value["files"]]
        tensors = {
            key: SavedTensor(
                tuple(entry["shape"]),
                getattr(torch, entry["dtype"]),
                tuple(TensorPart(files[number].name, *rest) for number, *rest in entry["parts"]),
            )
            for key, entry in value["tensors"].items()
        }
        return cls(tensors, files)

    @classmethod
    def from_safetensors(cls, files: Mapping[str, Callable[[int, int], bytes]]) -> ShardIndex:
        """The index of the whole tensors in safetensors files: name → function that reads (first byte, number of bytes)."""
        tensors: dict[str, SavedTensor] = {}
        for name, read in files.items():
            (size,) = struct.unpack("<Q", read(0, 8))
            header: dict[str, Any] = json.loads(read(8, size))
            header.pop("__metadata__", None)
            for key, entry in header.items():
                shape, start = tuple(entry["shape"]), 8 + size + entry["data_offsets"][0]
                part = TensorPart(name, 0, math.prod(shape), start, 0, 0)
                tensors[key] = SavedTensor(shape, _DTYPES[entry["dtype"]], (part,))
        return cls(tensors, ())
