"""Reading of a checkpoint's tensors by ranges: only the pieces that hold these elements are read, and each is verified.

    with open_tensors(checkpoint) as reader:
        reader.read("weight/a")                                   the whole tensor
        reader.read_range(TensorRange("exp_avg/a", 1000, 500))    500 elements of the flattened tensor from the 1000th on

A piece with another digest than when it was written is read once more, and then marks the checkpoint as damaged: it is passed over
from then on, and a run goes on from the one before.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from apprentice.errors import DamagedError, MissingError
from apprentice.storage import Folder, with_retries
from apprentice.train.checkpoint.format import CHECKSUMS, INDEX, Checkpoint, mark_damaged, mark_in_use
from apprentice.train.checkpoint.shard import TensorRange
from apprentice.train.checkpoint.shard_index import DIGEST_BYTES, PIECE_BYTES, ShardIndex, TensorPart

READS_AT_ONCE = 4  # ranges read ahead of the one that is used


class TensorReader:
    """Reads tensors of the checkpoint in `folder`. Its methods may be called from several threads.

    They raise `DamagedError` for bytes that changed since they were written, and `StorageError` if the store does not answer.
    """

    def __init__(self, folder: Folder) -> None:
        self._folder = folder
        self._lock = Lock()
        self._files: dict[str, Any] = {}
        self._digests: dict[str, bytes] = {}
        self._open_files = ExitStack()
        try:
            index = with_retries(folder / INDEX, (folder / INDEX).read_bytes)
        except MissingError:
            self._index = ShardIndex.from_safetensors({name: self._reads(name) for name in self._files_of_format_1()})
        else:
            self._index = ShardIndex.from_json(json.loads(index))
        self._sums = {file.name: file for file in self._index.files}

    def close(self) -> None:
        """Closes all files."""
        self._open_files.close()

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Key → shape of every tensor."""
        return {key: entry.shape for key, entry in self._index.tensors.items()}

    def read(self, key: str) -> Tensor:
        """The whole tensor, in the shape and number format it was written in."""
        shape = self._index.tensors[key].shape
        return self.read_range(TensorRange(key, 0, math.prod(shape))).view(shape)

    def read_range(self, place: TensorRange) -> Tensor:
        """The elements of a range, (numel,), in the number format they were written in."""
        entry = self._index.tensors[place.key]
        values = torch.empty(place.numel, dtype=entry.dtype)
        data = values.view(torch.uint8).numpy().data if place.numel else memoryview(b"")
        size = entry.dtype.itemsize
        for part in entry.parts:
            first, last = max(part.start, place.start), min(part.start + part.numel, place.start + place.numel)
            if first < last:
                target = data[(first - place.start) * size : (last - place.start) * size]
                self._read_bytes(part, size * part.numel, size * (first - part.start), target)
        return values

    def read_ranges(self, ranges: Iterable[TensorRange]) -> Iterator[Tensor]:
        """The elements of each range in turn; `READS_AT_ONCE` are read ahead by threads."""
        with ThreadPoolExecutor(READS_AT_ONCE, "apprentice-restore") as pool:
            ahead: deque[Future[Tensor]] = deque()
            try:
                for place in ranges:
                    ahead.append(pool.submit(self.read_range, place))
                    if len(ahead) > READS_AT_ONCE:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:
                for read in ahead:
                    read.cancel()

    def _files_of_format_1(self) -> list[str]:
        """Names of the tensors files of a checkpoint without an index; one that has been deleted meanwhile has none."""
        sums = self._folder / CHECKSUMS
        names: list[str] = []
        with suppress(MissingError):
            names = [name for name in json.loads(with_retries(sums, sums.read_bytes)) if name.endswith(".safetensors")]
        if not names:
            self._fail(INDEX, "is not there")
        return names

    def _read_bytes(self, part: TensorPart, nbytes: int, first: int, target: memoryview) -> None:
        """Reads bytes of a part of `nbytes` bytes, from the byte `first` on, into `target`; verifies the pieces that hold them."""
        piece = part.piece or PIECE_BYTES
        at_once = max(1, PIECE_BYTES // piece) * piece
        last = first + len(target)
        begin, end = first // piece * piece, min(-(-last // piece) * piece, nbytes)
        if not part.piece:  # verified before, with its whole file
            begin, end = first, last
        for start in range(begin, end, at_once):
            stop = min(start + at_once, end)
            data = self._read_verified(part, start, stop)
            used_first, used_last = max(start, first), min(stop, last)
            target[used_first - first : used_last - first] = data[used_first - start : used_last - start]

    def _read_verified(self, part: TensorPart, start: int, stop: int) -> memoryview:
        read = self._reads(part.file)
        data = memoryview(read(part.offset + start, stop - start))
        if part.piece and not self._is_verified(part, start, data):
            data = memoryview(read(part.offset + start, stop - start))
            if not self._is_verified(part, start, data):
                self._fail(part.file, f"bytes {part.offset + start} to {part.offset + stop} changed since they were written")
        return data

    def _is_verified(self, part: TensorPart, start: int, data: memoryview) -> bool:
        digests = self._digests_of(part.file)
        for number, place in enumerate(range(0, len(data), part.piece), part.first_digest + start // part.piece):
            digest = digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            if hashlib.sha256(data[place : place + part.piece]).digest() != digest:
                return False
        return True

    def _digests_of(self, name: str) -> bytes:
        with self._lock:
            if name not in self._digests:
                file = self._folder / self._sums[name].digests_file
                try:
                    digests = with_retries(file, file.read_bytes)
                except MissingError:
                    self._fail(file.name, "is not there")
                if hashlib.sha256(digests).hexdigest() != self._sums[name].digests:
                    self._fail(file.name, "changed since it was written")
                self._digests[name] = digests
            return self._digests[name]

    def _fail(self, name: str, reason: str) -> None:
        mark_damaged(self._folder, f"{name}: {reason}")
        raise DamagedError(
            f"checkpoint {self._folder} is damaged ({name}: {reason}) and is passed over from now on; give the same command again:"
            " it goes on from the checkpoint before."
        )

    def _reads(self, name: str) -> Any:
        """Function that reads (first byte, number of bytes) of a file."""

        def read(offset: int, size: int) -> bytes:
            file = self._folder / name
            try:
                data = with_retries(file, lambda: self._opened(name).read_at(size, offset))
            except MissingError:
                data = b""
            if len(data) != size:
                self._fail(name, "is not whole")
            return bytes(data) if not isinstance(data, bytes) else data

        return read

    def _opened(self, name: str) -> Any:
        with self._lock:
            if name not in self._files:
                fs, path = (self._folder / name).filesystem()
                self._files[name] = self._open_files.enter_context(fs.open_input_file(path))
            return self._files[name]


@contextmanager
def open_tensors(checkpoint: Checkpoint) -> Iterator[TensorReader]:
    """Context with a reader of the checkpoint's tensors; inside it, the checkpoint is not deleted."""
    with mark_in_use(checkpoint.folder):
        reader = TensorReader(checkpoint.folder)
        try:
            yield reader
        finally:
            reader.close()
