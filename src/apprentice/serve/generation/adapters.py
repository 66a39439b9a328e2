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
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import pyarrow.fs as pafs

from apprentice.data.encoding.prompt_contract import layout_over
from apprentice.errors import ApprenticeError, StorageError
from apprentice.run.folder import read_contract
from apprentice.serve.api.schemas import RequestProblem
from apprentice.serve.engines.base import Overloaded
from apprentice.serve.generation.served_models import Lease, Model
from apprentice.storage import Folder

log = logging.getLogger(__name__)
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_FRESH_S = 5.0  # a listing is believed for so long
_AGAIN_S = 1.0  # and for so long when a name is not in it
_LISTING_S = 1.0  # how long a request for a known name waits for a new listing
_PATIENCE_S = 5.0  # how long who needs a place in memory leaves it to chance that one becomes free
_READERS = 4  # adapters that are read at once


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

    model: asyncio.Future[Model]
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
        self._places: dict[str, Place] | None = None  # None until they could be listed once
        self._listed_at = -_FRESH_S
        self._listing: asyncio.Task[None] | None = None
        self._entries: OrderedDict[tuple[str, str], _Entry] = OrderedDict()  # longest not asked for first
        self._leaving: tuple[str, str] | None = None  # whom nobody joins any more, so that its place becomes free
        self._refused: dict[str, tuple[str, str]] = {}  # which version was refused, and why
        self._turn = asyncio.Lock()  # who comes first gets the next place
        self._waiting = 0
        self._freed = asyncio.Event()
        self._readers = ThreadPoolExecutor(_READERS, "adapters")  # a slow store holds up other adapters at most

    async def names(self) -> list[str]:
        return list(await self._list(_FRESH_S))

    async def take(self, name: str) -> Lease | None:
        places = await self._list(_FRESH_S if name in (self._places or {}) else _AGAIN_S, name)
        if (place := places.get(name)) is None:
            return None
        version, reason = self._refused.get(name, ("", ""))
        if version == place.version:
            raise RequestProblem(reason, param="model", code="adapter_refused")
        key = (name, place.version)
        entry = await self._entry(key, place)
        try:
            model = await asyncio.shield(entry.model)
        except BaseException:
            self._give_back(entry)
            if entry.model.done() and self._entries.get(key) is entry:
                del self._entries[key]  # it did not come into memory; the next who asks tries again
            raise
        return Lease(model, lambda: self._give_back(entry))

    async def _entry(self, key: tuple[str, str], place: Place) -> _Entry:
        """The adapter's place in memory, held for one more user. Raises `Overloaded`.

        Who asks for one that is in memory waits for nobody. Who needs a place waits until one is free, and after a while sees to
        it: then the adapter not asked for the longest takes no new users.
        """
        if key in self._entries and key != self._leaving:
            return self._join(key)
        if self._waiting >= self._most_waiting:
            raise Overloaded
        self._waiting += 1
        try:
            async with self._turn:
                while key not in self._entries and len(self._entries) >= self._most and not self._evict():
                    self._freed.clear()
                    try:
                        async with asyncio.timeout(_PATIENCE_S if self._leaving is None else None):
                            await self._freed.wait()
                    except TimeoutError:
                        self._leaving = next(iter(self._entries))
                if key not in self._entries:
                    loop = asyncio.get_running_loop()
                    read = loop.run_in_executor(self._readers, self._read, key[0], place)
                    self._entries[key] = _Entry(asyncio.ensure_future(read))
                return self._join(key)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._leaving = None

    def _join(self, key: tuple[str, str]) -> _Entry:
        self._entries.move_to_end(key)
        self._entries[key].users += 1
        return self._entries[key]

    def _evict(self) -> bool:
        """Forgets the adapter that was not asked for the longest, of those that nobody uses; false if there is none."""
        for key, entry in self._entries.items():
            if not entry.users:
                del self._entries[key]
                self._leaving = None
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
                words = self._base.contract
                contract = read_contract(folder) or (words and words.for_other_weights())
            except (ApprenticeError, OSError) as error:
                shown = str(place.folder), str(Path(scratch) / "adapter")
                reason = str(error).replace(shown[0], repr(name)).replace(shown[1], repr(name))
                if isinstance(error, StorageError | OSError) or isinstance(error.__cause__, OSError):
                    log.warning("adapter %s cannot be read now: %s", name, error)
                    message = f"adapter {name!r} cannot be read now: {reason}"
                    raise RequestProblem(
                        message, status=503, param="model", kind="server_error", code="adapter_unreachable", retry_after_s=1
                    ) from error
                log.warning("adapter %s is refused: %s", name, error)
                self._refused[name] = (place.version, reason)
                raise RequestProblem(reason, param="model", code="adapter_refused") from error
        log.info("adapter %s is in memory", name)
        return Model(name, self._base.engine, layout, contract, adapter)

    async def _list(self, fresh_s: float, known: str | None = None) -> Mapping[str, Place]:
        """The places, listed again if they are older than `fresh_s`; where they cannot be listed the old ones hold.

        Who asks for one that is `known` waits for a slow store only a moment. Raises `RequestProblem` where none were ever listed.
        """
        if time.monotonic() - self._listed_at >= fresh_s:
            if self._listing is None or self._listing.done():
                self._listing = asyncio.create_task(self._list_again())
            await asyncio.wait({self._listing}, timeout=_LISTING_S if known in (self._places or {}) else None)
        if self._places is None:
            message = "the adapters of this endpoint cannot be listed now; its log says why."
            raise RequestProblem(
                message, status=503, param="model", kind="server_error", code="adapter_unreachable", retry_after_s=1
            )
        return self._places

    async def _list_again(self) -> None:
        try:
            self._places = await asyncio.to_thread(adapters_in, self._folder)
        except StorageError as error:
            log.warning("%s", error)
        self._listed_at = time.monotonic()
