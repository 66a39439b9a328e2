"""Files and folders on local disk, NFS, `s3://`, `gs://` or `hdfs://`, behind one small class over `pyarrow.fs`.

Files are written atomically: on object stores by their own atomic put, elsewhere through a temporary name and a rename. HDFS cannot
rename onto an existing file, so that a file replaced there is missing for a moment.
"""

from __future__ import annotations

import errno
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pyarrow.fs as pafs
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_exponential

from apprentice.errors import MissingError, StorageError
from apprentice.s3_create import create_object

T = TypeVar("T")
_FULL = (errno.ENOSPC, errno.EDQUOT)
_PUT_WHOLE = ("s3", "gcs", "abfs")  # pyarrow's names of file systems where a file appears once it is complete
ATTEMPTS = 6  # to read, with pauses of 1, 2, 4, 8 and 16 seconds between them


def is_uri(path: str) -> bool:
    """True for a URI such as `s3://…` or `file://…`, False for a plain path."""
    return "://" in path


def refuse_credentials(uri: str) -> None:
    """Raises `StorageError` for `scheme://user:password@…`, since recipes, run folders and job metadata would show the password."""
    scheme, _, rest = uri.partition("://")
    user, at_sign, _ = rest.partition("/")[0].rpartition("@")
    if at_sign and ":" in user:
        raise StorageError(
            f"{scheme}://… has a password in it, which recipes, logs and run folders would show; give it by the environment"
            " (AWS_SECRET_ACCESS_KEY, GOOGLE_APPLICATION_CREDENTIALS, or the option for a key) instead."
        )


def pause(seconds: float) -> None:
    """Sleeps between two attempts to read."""
    time.sleep(seconds)


def with_retries(place: Folder, ask: Callable[[], T]) -> T:
    """The result of `ask()`, which accesses `place`; it is retried for half a minute while the store does not answer.

    Raises `MissingError` at once where nothing exists, `OSError` for a full disk, and `StorageError` after the last attempt.
    """
    retries = Retrying(
        retry=retry_if_exception(_may_pass),
        wait=wait_exponential(),
        stop=stop_after_attempt(ATTEMPTS),
        sleep=lambda seconds: pause(seconds),
        reraise=True,
    )
    try:
        return retries(ask)
    except FileNotFoundError as error:
        raise MissingError(f"{place} does not exist.") from error
    except OSError as error:
        if error.errno in _FULL:
            raise
        reason = " ".join(str(error.strerror or error).split())
        raise StorageError(
            f"{place} does not answer ({reason}); nothing of the run is lost: give the same command again when it can be read."
        ) from error


def _may_pass(error: BaseException) -> bool:
    """Whether a retry may help: not where a path is missing or forbidden, or a disk full."""
    if isinstance(error, StorageError):  # a store that could not be opened
        return not isinstance(error, MissingError) and isinstance(error.__cause__, OSError)
    lasting = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
    return isinstance(error, OSError) and not isinstance(error, lasting) and error.errno not in _FULL


@dataclass(frozen=True)
class Folder:
    """A folder or a file, named by `uri`: an absolute local path or a URI.

    `folder / "name"` is a child. Methods raise `StorageError` for a URI that cannot be opened, `MissingError` for reading a missing
    file, and pyarrow's `OSError` where the store fails.
    """

    uri: str

    @classmethod
    def at(cls, path: str | Path) -> Folder:
        """The folder at `path`; local paths become absolute. Raises `StorageError` for a URI with a password in it."""
        text = str(path)
        if text.startswith("file://"):
            text = text.removeprefix("file://")
        refuse_credentials(text)
        return cls(text.rstrip("/") if is_uri(text) else str(Path(text).expanduser().absolute()))

    def __truediv__(self, part: str) -> Folder:
        return Folder(f"{self.uri.rstrip('/')}/{part.strip('/')}")

    def __str__(self) -> str:
        return self.uri

    @property
    def name(self) -> str:
        """The last part of the path."""
        return self.uri.rstrip("/").rsplit("/", 1)[-1]

    @property
    def is_local(self) -> bool:
        """Whether this is on a local disk (or a mounted file system), not behind a URI."""
        return not is_uri(self.uri)

    @property
    def local(self) -> Path:
        """This folder as a `Path`. Raises `StorageError` where it is not on a local disk."""
        if not self.is_local:
            raise StorageError(f"{self.uri} is not on a local disk; copy it to one first.")
        return Path(self.uri)

    @property
    def parent(self) -> Folder:
        """The folder that this is in."""
        return Folder(self.uri.rstrip("/").rsplit("/", 1)[0])

    def filesystem(self) -> tuple[pafs.FileSystem, str]:
        """(pyarrow file system, path inside it). Raises `StorageError` for a URI that cannot be opened."""
        if self.is_local:
            return pafs.LocalFileSystem(), self.uri
        try:
            fs, path = pafs.FileSystem.from_uri(self.uri)
        except (OSError, ValueError, NotImplementedError) as error:
            if self.uri.startswith(("hdfs://", "viewfs://")) and "Unable to load" in str(error):
                missing = str(error).split("\n", 1)[0].removeprefix("Unable to load ")
                raise StorageError(
                    f"{self.uri} needs Hadoop's client on this machine, whose {missing} is not found: install Java and Hadoop, set"
                    " JAVA_HOME and HADOOP_HOME, and CLASSPATH to what `hadoop classpath --glob` prints."
                ) from error
            raise StorageError(f"{self.uri} cannot be opened: {' '.join(str(error).split())}") from error
        return fs, path

    def exists(self) -> bool:
        """Whether a file or folder is there."""
        fs, path = self.filesystem()
        return bool(fs.get_file_info(path).type != pafs.FileType.NotFound)

    def make(self) -> Folder:
        """Creates the folder and its parents; does nothing if it exists. Raises `StorageError`."""
        fs, path = self.filesystem()
        try:
            fs.create_dir(path, recursive=True)
        except OSError as error:
            raise StorageError(f"{self.uri} cannot be created: {error}. Choose another `storage`.") from error
        return self

    def children(self) -> list[Folder]:
        """The files and folders directly inside, sorted by name; empty if the folder does not exist."""
        fs, path = self.filesystem()
        infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return [self / info.base_name for info in sorted(infos, key=lambda info: str(info.base_name))]

    def sizes(self) -> dict[str, int]:
        """Name → bytes of the files directly inside, by one request; empty if the folder does not exist."""
        fs, path = self.filesystem()
        infos = fs.get_file_info(pafs.FileSelector(path, allow_not_found=True))
        return {info.base_name: info.size for info in infos if info.is_file}

    def versions(self) -> dict[str, str]:
        """Path inside the folder → version of the file: its ETag in object stores, elsewhere size and modification time."""
        fs, path = self.filesystem()
        infos = fs.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
        files = [info for info in infos if info.is_file]
        with ThreadPoolExecutor(max_workers=8) as pool:
            versions = pool.map(lambda info: _version(fs, info), files)
            return {info.path.removeprefix(path).lstrip("/"): version for info, version in zip(files, versions, strict=True)}

    def read_bytes(self) -> bytes:
        """The content of the file. Raises `MissingError` if it does not exist."""
        fs, path = self.filesystem()
        try:
            with fs.open_input_stream(path) as stream:
                return bytes(stream.read())
        except FileNotFoundError as error:
            raise MissingError(f"{self.uri} does not exist.") from error

    def read_text(self) -> str:
        """The content of the file, decoded as UTF-8."""
        return self.read_bytes().decode("utf-8")

    def read_json(self) -> Any:
        """The content of the file, parsed as JSON."""
        return json.loads(self.read_bytes())

    def write_bytes(self, data: bytes) -> None:
        """Writes the file atomically; a reader never sees a part of it."""
        fs, path = self.filesystem()
        if self.is_local:
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
            try:
                part.write_bytes(data)
                os.replace(part, target)
            finally:
                part.unlink(missing_ok=True)
            return
        with _whole(fs, path) as temporary, fs.open_output_stream(temporary) as stream:
            stream.write(data)

    @contextmanager
    def open_writer(self) -> Iterator[Any]:
        """Context manager with a stream that writes the file piece by piece; elsewhere than on object stores it appears whole.

        There a block that fails leaves what it has written, so that another file must say which ones count.
        """
        fs, path = self.filesystem()
        with _whole(fs, path) as part, fs.open_output_stream(part) as stream:
            yield stream

    def create(self, data: bytes) -> bool:
        """Creates the file with `data`; returns False, and writes nothing, if it exists already.

        Of several concurrent callers one succeeds: on disks and NFS by a hard link, on S3 by `If-None-Match`. Other stores have no
        conditional writes, and there two callers at the same moment may both succeed.
        """
        if self.is_local:
            return _create_local(self.local, data)
        if self.uri.startswith("s3://") and (created := create_object(self.uri, data)) is not None:
            return created
        if self.exists():
            return False
        self.write_bytes(data)
        return True

    def write_text(self, text: str) -> None:
        """Writes the file atomically, encoded as UTF-8."""
        self.write_bytes(text.encode("utf-8"))

    def write_json(self, value: Any) -> None:
        """Writes `value` atomically as indented JSON."""
        self.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")

    def upload(self, source: Path) -> None:
        """Copies the local folder or file `source` here; a single file appears atomically, those of a folder one by one."""
        fs, path = self.filesystem()
        systems = {"source_filesystem": pafs.LocalFileSystem(), "destination_filesystem": fs}
        if source.is_dir():
            fs.create_dir(path, recursive=True)
            pafs.copy_files(str(source), path, **systems)
            return
        fs.create_dir(path.rpartition("/")[0], recursive=True)
        with _whole(fs, path) as part:
            pafs.copy_files(str(source), part, **systems)

    def download(self, target: Path) -> Path:
        """Copies this folder to the local folder `target`."""
        fs, path = self.filesystem()
        target.mkdir(parents=True, exist_ok=True)
        pafs.copy_files(path, str(target), source_filesystem=fs, destination_filesystem=pafs.LocalFileSystem())
        return target

    def delete(self) -> None:
        """Removes the file, or the folder with its content; does nothing if it does not exist."""
        fs, path = self.filesystem()
        kind = fs.get_file_info(path).type
        if kind == pafs.FileType.Directory:
            fs.delete_dir(path)
        elif kind == pafs.FileType.File:
            fs.delete_file(path)


@contextmanager
def _whole(fs: pafs.FileSystem, path: str) -> Iterator[str]:
    """Context manager for an atomic write of `path`: yields the path to write to.

    That is `path` itself on object stores, elsewhere a temporary path beside it, which is renamed at the end.
    """
    if fs.type_name in _PUT_WHOLE:
        yield path
        return
    folder, slash, name = path.rpartition("/")
    part = f"{folder}{slash}.{name}.{uuid.uuid4().hex[:8]}.part"
    fs.create_dir(folder, recursive=True)
    try:
        yield part
        _rename(fs, part, path)
    except BaseException:
        with suppress(OSError):
            fs.delete_file(part)
        raise


def _rename(fs: pafs.FileSystem, part: str, path: str) -> None:
    try:
        fs.move(part, path)
    except OSError:
        if not fs.get_file_info(path).is_file:
            raise
        fs.delete_file(path)
        fs.move(part, path)


def _version(fs: pafs.FileSystem, info: pafs.FileInfo) -> str:
    if fs.type_name in _PUT_WHOLE:
        with fs.open_input_file(info.path) as stream:
            if tag := (stream.metadata() or {}).get("ETag"):
                return str(tag.decode())
    return f"{info.size}-{info.mtime_ns}"


def _create_local(target: Path, data: bytes) -> bool:
    """Creates a local file exclusively by a hard link to a complete temporary file; by `O_EXCL` without hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.write_bytes(data)
        os.link(part, target)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
            raise
        try:
            with target.open("xb") as stream:
                stream.write(data)
        except FileExistsError:
            return False
    finally:
        part.unlink(missing_ok=True)
    return True


def user_cache() -> Path:
    """The cache folder of this user: `$APPRENTICE_CACHE`, or `apprentice` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if chosen := os.environ.get("APPRENTICE_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "apprentice"
