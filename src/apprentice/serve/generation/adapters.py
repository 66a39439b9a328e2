"""LoRA adapters in one folder, on disk or in an object store, loaded on request and cached in memory (LRU).

    adapters/anna/adapter_config.json     a PEFT folder: the model `anna`
    adapters/bert/adapter/…               a run's folder, whose adapter lies in it: the model `bert`

Each adapter is served under its folder's name. Names are looked up in the folder's listing, which is read again every few seconds,
so no name is ever made a path. A changed adapter is loaded as a new version; replies in progress keep the old one.
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
from apprentice.run.contract import read_contract
from apprentice.run.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from apprentice.serve.api.schemas.problems import RequestProblem
from apprentice.serve.engines.base import Overloaded
from apprentice.serve.generation.served_models import ModelLease, ServedModel
from apprentice.storage import Folder

log = logging.getLogger(__name__)
_FRESH_S = 5.0  # seconds for which a listing is used
_AGAIN_S = 1.0  # seconds for which it is used when a requested name is not in it
_LISTING_S = 1.0  # seconds that a request for a known name waits for a new listing
_PATIENCE_S = 5.0  # seconds until a request that waits for room in memory makes the oldest adapter leave
_READERS = 4  # adapters that are loaded at once


class AdapterFolder(NamedTuple):
    """An adapter's folder, and a text that changes with its files."""

    folder: Folder
    version: str


def list_adapters(folder: Folder) -> dict[str, AdapterFolder]:
    """Adapters in `folder` by name. Raises `StorageError` where they cannot be listed."""
    fs, path = folder.filesystem()
    try:
        infos = fs.get_file_info(pafs.FileSelector(path))
        names = sorted(str(info.base_name) for info in infos if info.type == pafs.FileType.Directory)
        subfolders = [f"{name}{inner}" for name in names if not name.startswith(".") for inner in ("", "/adapter")]
        files = fs.get_file_info(
            [f"{path}/{subfolder}/{file}" for subfolder in subfolders for file in (ADAPTER_CONFIG, ADAPTER_WEIGHTS)]
        )
    except OSError as error:
        raise StorageError(f"the adapters in {folder} cannot be listed ({error.__class__.__name__}); check the path.") from error
    adapters: dict[str, AdapterFolder] = {}
    for subfolder, config, weights in zip(subfolders, files[::2], files[1::2], strict=True):
        if config.type == pafs.FileType.File:
            version = f"{config.mtime_ns}-{weights.mtime_ns}-{weights.size}"
            adapters.setdefault(subfolder.partition("/")[0], AdapterFolder(folder / subfolder, version))
    return adapters


@dataclass
class _CachedAdapter:
    """An adapter in memory or being loaded, and how many requests use it."""

    model: asyncio.Future[ServedModel]
    users: int = 0


class AdapterCache:
    """Cache of the adapters in `folder` over the model `base`, whose weights have the hash `base_sha256`.

    At most `most` are in memory at once, and at most `most_waiting` requests wait for room. All methods are called from one
    event loop.
    """

    def __init__(self, folder: Folder, base: ServedModel, base_sha256: str, *, most: int, most_waiting: int) -> None:
        self._folder = folder
        self._base = base
        self._base_sha256 = base_sha256
        self._most, self._most_waiting = most, most_waiting
        self._sources: dict[str, AdapterFolder] | None = None  # None until the first listing succeeds
        self._listed_at = -_FRESH_S
        self._listing: asyncio.Task[None] | None = None
        self._entries: OrderedDict[tuple[str, str], _CachedAdapter] = OrderedDict()  # by (name, version), least recently used first
        self._leaving: tuple[str, str] | None = None  # the entry that takes no new users, so that it becomes free
        self._refused: dict[str, tuple[str, str]] = {}  # name → the version that was refused, and why
        self._turn = asyncio.Lock()  # the next free room goes to the request that came first
        self._waiting = 0
        self._freed = asyncio.Event()
        self._readers = ThreadPoolExecutor(_READERS, "adapters")  # so that a slow store delays nothing but adapters

    async def names(self) -> list[str]:
        """Names of the adapters in the folder now."""
        return list(await self._list(_FRESH_S))

    async def take(self, name: str) -> ModelLease | None:
        """A lease of the adapter, loaded if need be; None for an unknown name. Raises `RequestProblem` or `Overloaded`."""
        sources = await self._list(_FRESH_S if name in (self._sources or {}) else _AGAIN_S, name)
        if (source := sources.get(name)) is None:
            return None
        version, reason = self._refused.get(name, ("", ""))
        if version == source.version:
            raise RequestProblem(reason, param="model", code="adapter_refused")
        key = (name, source.version)
        entry = await self._entry(key, source)
        try:
            model = await asyncio.shield(entry.model)
        except BaseException:
            self._give_back(entry)
            if entry.model.done() and self._entries.get(key) is entry:
                del self._entries[key]  # it was not loaded; the next request tries again
            raise
        return ModelLease(model, lambda: self._give_back(entry))

    async def _entry(self, key: tuple[str, str], source: AdapterFolder) -> _CachedAdapter:
        """The adapter's entry, with one more user; the adapter is loaded if it is not in memory. Raises `Overloaded`.

        A request for an adapter in memory does not wait, unless that adapter is to leave. Any other waits until there is room;
        after `_PATIENCE_S` seconds the least recently used adapter takes no new users and leaves once nobody uses it.
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
                    read = loop.run_in_executor(self._readers, self._read, key[0], source)
                    self._entries[key] = _CachedAdapter(asyncio.ensure_future(read))
                return self._join(key)
        finally:
            self._waiting -= 1
            if not self._waiting:
                self._leaving = None

    def _join(self, key: tuple[str, str]) -> _CachedAdapter:
        self._entries.move_to_end(key)
        self._entries[key].users += 1
        return self._entries[key]

    def _evict(self) -> bool:
        """Drops the least recently used adapter without users; false if there is none."""
        for key, entry in self._entries.items():
            if not entry.users:
                del self._entries[key]
                self._leaving = None
                log.info("adapter %s leaves the memory", key[0])
                return True
        return False

    def _give_back(self, entry: _CachedAdapter) -> None:
        entry.users -= 1
        self._freed.set()

    def _read(self, name: str, source: AdapterFolder) -> ServedModel:
        """Loads an adapter, in a thread. Raises `RequestProblem`."""
        with TemporaryDirectory(prefix="apprentice-") as scratch:
            try:
                folder = source.folder.local if source.folder.is_local else source.folder.download(Path(scratch) / "adapter")
                layout = layout_over(name, folder, self._base.layout, self._base_sha256)
                adapter = self._base.engine.load_adapter(folder)
                base_contract = self._base.contract
                contract = read_contract(folder) or (base_contract and base_contract.for_other_weights())
            except (ApprenticeError, OSError) as error:
                paths = str(source.folder), str(Path(scratch) / "adapter")
                reason = str(error).replace(paths[0], repr(name)).replace(paths[1], repr(name))
                if isinstance(error, StorageError | OSError) or isinstance(error.__cause__, OSError):
                    log.warning("adapter %s cannot be read now: %s", name, error)
                    message = f"adapter {name!r} cannot be read now: {reason}"
                    raise RequestProblem(
                        message, status=503, param="model", kind="server_error", code="adapter_unreachable", retry_after_s=1
                    ) from error
                log.warning("adapter %s is refused: %s", name, error)
                self._refused[name] = (source.version, reason)
                raise RequestProblem(reason, param="model", code="adapter_refused") from error
        log.info("adapter %s is in memory", name)
        return ServedModel(name, self._base.engine, layout, contract, adapter)

    async def _list(self, fresh_s: float, known: str | None = None) -> Mapping[str, AdapterFolder]:
        """Adapters by name, listed again if the listing is older than `fresh_s` seconds; if that fails, the old listing is kept.

        Waits at most `_LISTING_S` seconds for the new listing if the old one has the name `known`. Raises `RequestProblem` where no
        listing has ever succeeded.
        """
        if time.monotonic() - self._listed_at >= fresh_s:
            if self._listing is None or self._listing.done():
                self._listing = asyncio.create_task(self._list_again())
            await asyncio.wait({self._listing}, timeout=_LISTING_S if known in (self._sources or {}) else None)
        if self._sources is None:
            message = "the adapters of this endpoint cannot be listed now; its log says why."
            raise RequestProblem(
                message, status=503, param="model", kind="server_error", code="adapter_unreachable", retry_after_s=1
            )
        return self._sources

    async def _list_again(self) -> None:
        try:
            self._sources = await asyncio.to_thread(list_adapters, self._folder)
        except StorageError as error:
            log.warning("%s", error)
        self._listed_at = time.monotonic()
