"""A file system that counts what each thread writes and reads, and can end a process at any of its operations."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from apprentice.storage import Folder


class CountingStore(pafs.FileSystemHandler):  # type: ignore[misc]
    """The local file system, which counts bytes by the thread's name. `notice` is called before every change."""

    def __init__(self, notice: Callable[[], None] = lambda: None) -> None:
        self._local = pafs.LocalFileSystem()
        self._notice = notice
        self.bytes_written: Counter[str] = Counter()
        self.bytes_read: Counter[str] = Counter()

    def filesystem(self, folder: Folder) -> tuple[pafs.FileSystem, str]:
        """What `Folder.filesystem` is to give instead."""
        return pafs.PyFileSystem(self), folder.uri

    def __eq__(self, other: object) -> bool:
        return self is other

    def get_type_name(self) -> str:
        return "counting"

    def normalize_path(self, path: str) -> str:
        return path

    def get_file_info(self, paths: list[str]) -> Any:
        return self._local.get_file_info(paths)

    def get_file_info_selector(self, selector: Any) -> Any:
        return self._local.get_file_info(selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        self._notice()
        self._local.create_dir(path, recursive=recursive)

    def delete_dir(self, path: str) -> None:
        self._local.delete_dir(path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool) -> None:
        self._local.delete_dir_contents(path, missing_dir_ok=missing_dir_ok)

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError

    def delete_file(self, path: str) -> None:
        self._local.delete_file(path)

    def move(self, source: str, target: str) -> None:
        self._local.move(source, target)

    def copy_file(self, source: str, target: str) -> None:
        self._local.copy_file(source, target)

    def open_input_stream(self, path: str) -> Any:
        return self.open_input_file(path)

    def open_input_file(self, path: str) -> Any:
        if self._local.get_file_info(path).type == pafs.FileType.NotFound:
            raise FileNotFoundError(path)
        return pa.PythonFile(_CountedFile(self._local.open_input_file(path), self), mode="r")

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        self._notice()
        return pa.PythonFile(_CountedFile(self._local.open_output_stream(path), self), mode="w")

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        raise NotImplementedError

    def notice(self) -> None:
        self._notice()


class _CountedFile:
    """A file whose bytes are counted for the thread that moves them."""

    def __init__(self, inner: Any, store: CountingStore) -> None:
        self._inner, self._store = inner, store

    def write(self, data: Any) -> int:
        self._store.notice()
        self._store.bytes_written[threading.current_thread().name] += len(data)
        return int(self._inner.write(data))

    def read(self, size: int = -1) -> bytes:
        data: bytes = self._inner.read(size if size >= 0 else None)
        self._store.bytes_read[threading.current_thread().name] += len(data)
        return data

    def seek(self, place: int, whence: int = 0) -> int:
        return int(self._inner.seek(place, whence))

    def tell(self) -> int:
        return int(self._inner.tell())

    def flush(self) -> None:
        self._inner.flush()

    def close(self) -> None:
        self._inner.close()

    @property
    def closed(self) -> bool:
        return bool(self._inner.closed)
