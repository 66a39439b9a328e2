"""Adapters in one folder, on disk or in an object store, each served under its folder's name; those asked for last are in memory.

    adapters/anna/adapter_config.json     a PEFT folder: the model `anna`
    adapters/bert/adapter/…               a run's folder, whose adapter lies in it: the model `bert`

Names are looked up in the folder's listing, which is read again every few seconds, so no name is ever made a path. A new version
of an adapter is another one: replies under way go on with what they began with. Knows nothing of HTTP, or of what an adapter is.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow.fs as pafs

from apprentice.artifacts import read_contract
from apprentice.data.contract import layout_over
from apprentice.errors import ApprenticeError, StorageError
from apprentice.serve.catalogue import Lease, Model
from apprentice.serve.engine import Overloaded
from apprentice.serve.protocol import RequestProblem
from apprentice.storage import Folder

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FRESH_S = 5.0  # a listing is believed for so long
_AGAIN_S = 1.0  # and for so long when a name is not in it


class Place(NamedTuple):
    """Where an adapter lies, and a text that is another one when its files are."""

    folder: Folder
    version: str


def adapters_in(folder: Folder) -> dict[str, Place]:
    """Name → place of the adapters in `folder`. Raises `StorageError`."""
    fs, path = folder.filesystem()
    try:
        infos = fs.get_file_info(pafs.FileSelector(path))
        names = sorted(str(info.base_name) for info in infos if info.type == pafs.FileType.Directory)
        inside = [f"{name}{inner}" for name in names if not name.startswith(".") for inner in ("", "/adapter")]
        files = fs.get_file_info([f"{path}/{where}/{file}" for where in inside for file in (CONFIG, WEIGHTS)])
    except OSError as error:
        raise StorageError(f"the adapters in {folder} cannot be listed ({error.__class__.__name__}); check the path.") from error
    found: dict[str, Place] = {}
    for where, config, weights in zip(inside, files[::2], files[1::2], strict=True):
        if config.type == pafs.FileType.File:
            version = f"{config.mtime_ns}-{weights.mtime_ns}-{weights.size}"
            found.setdefault(where.partition("/")[0], Place(folder / where, version))
    return found


@dataclass
class _Entry:
    """One adapter in memory, or on its way there."""

    model: asyncio.Task[Model]
    users: int = 0


class Adapters:
    """The adapters in `folder` over `base`, whose weights have the hash `base_sha256`.

    `most` are in memory at once, and at most `most_waiting` requests wait for theirs. All methods are called from one event loop.
    """

    def __init__(self, folder: Folder, base: Model, base_sha256: str, *, most: int, most_waiting: int) -> None:
        self._folder = folder
        self._base = base
        self._base_sha256 = base_sha256
        self._most, self._most_waiting = most, most_waiting
        self._places: dict[str, Place] = {}
        self._listed_at = -_FRESH_S
        self._listing = asyncio.Lock()
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()  # longest not asked for first
        self._refused: dict[str, tuple[str, RequestProblem]] = {}  # which version was refused, and why
        self._turn = asyncio.Lock()  # who comes first gets the next place
        self._waiting = 0
        self._freed = asyncio.Event()

    async def names(self) -> list[str]:
        await self._list(_FRESH_S)
        return list(self._places)

    async def take(self, name: str) -> Lease | None:
        await self._list(_FRESH_S if name in self._places else _AGAIN_S)
        if (place := self._places.get(name)) is None:
            return None
        version, problem = self._refused.get(name, ("", None))
        if problem is not None and version == place.version:
            raise problem
        key = (name, place.version)
        entry = await self._entry(key, place)
        try:
            model = await asyncio.shield(entry.model)
        except BaseException as error:
            self._give_back(entry)
            if isinstance(error, RequestProblem):
                self._entries.pop(key, None)
                self._refused[name] = (place.version, error)
            raise
        return Lease(model, lambda: self._give_back(entry))

    async def _entry(self, key: tuple[str, str], place: Place) -> _Entry:
        """The adapter's place in memory, held for one more user. Raises `Overloaded`."""
        if self._waiting >= self._most_waiting:
            raise Overloaded
        self._waiting += 1
        try:
            async with self._turn:
                while key not in self._entries and len(self._entries) >= self._most and not self._evict():
                    self._freed.clear()
                    await self._freed.wait()
                if key not in self._entries:
                    self._entries[key] = _Entry(asyncio.create_task(asyncio.to_thread(self._read, key[0], place)))
                self._entries.move_to_end(key)
                self._entries[key].users += 1
                return self._entries[key]
        finally:
            self._waiting -= 1

    def _evict(self) -> bool:
        """Forgets the adapter that was not asked for the longest, of those that nobody uses; false if there is none."""
        for key, entry in self._entries.items():
            if not entry.users:
                del self._entries[key]
                log.info("adapter %s leaves the memory", key[0])
                return True
        return False

    def _give_back(self, entry: _Entry) -> None:
        entry.users -= 1
        self._freed.set()

    def _read(self, name: str, place: Place) -> Model:
        """In a thread. Raises `RequestProblem`."""
        with TemporaryDirectory(prefix="apprentice-") as scratch:
            try:
                folder = place.folder.local if place.folder.is_local else place.folder.download(Path(scratch) / "adapter")
                layout = layout_over(name, folder, self._base.layout, self._base_sha256)
                adapter = self._base.engine.adapter(folder)
                contract = read_contract(folder) or self._base.contract
            except (ApprenticeError, OSError) as error:
                shown = str(place.folder), str(Path(scratch) / "adapter")
                reason = str(error).replace(shown[0], repr(name)).replace(shown[1], repr(name))
                log.warning("adapter %s is refused: %s", name, error)
                raise RequestProblem(reason, param="model", code="adapter_refused") from error
        log.info("adapter %s is in memory", name)
        return Model(name, self._base.engine, layout, contract, adapter)

    async def _list(self, fresh_s: float) -> None:
        """Reads the listing again if it is older; where it cannot be read the old one holds."""
        async with self._listing:
            if time.monotonic() - self._listed_at < fresh_s:
                return
            try:
                self._places = await asyncio.to_thread(adapters_in, self._folder)
            except StorageError as error:
                log.warning("%s", error)
            self._listed_at = time.monotonic()
