"""API keys: who may send requests, for which models, and how many requests and tokens a minute.

A keys file is YAML. Keys are stored as sha256 only (a key has 256 random bits, so nobody finds one by trying):

    keys:
      - name: anna
        sha256: 9f86d08…                 # printed by `apprentice key anna`
        models: [flan-mini]              # left out: all
        requests_per_minute: 60          # left out: no limit
        tokens_per_minute: 20000         # prompt and reply together
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import logging
import os
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from apprentice.errors import ServingError
from apprentice.plain_yaml import load_yaml

log = logging.getLogger(__name__)
REFRESH_S = 5.0  # seconds between two looks at the keys file
GRACE_S = 60.0  # seconds for which the last keys are accepted after the file became unreadable
KEYS_FILE = "APPRENTICE_API_KEYS_FILE"  # environment variable with the path of the keys file
_PREFIX = "sk-apprentice-"


class ApiKey(BaseModel):
    """One entry of the keys file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = Field(min_length=1)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    models: tuple[str, ...] | None = None
    requests_per_minute: Annotated[int, Field(ge=1)] | None = None
    tokens_per_minute: Annotated[int, Field(ge=1)] | None = None

    @property
    def is_limited(self) -> bool:
        """Whether its requests or tokens are counted."""
        return self.requests_per_minute is not None or self.tokens_per_minute is not None

    def may_use(self, model: str) -> bool:
        """Whether requests with this key may name the model."""
        return self.models is None or model in self.models


class _KeysFile(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)
    keys: tuple[ApiKey, ...] = Field(min_length=1)


class ApiKeys:
    """The keys in `file`, read again when the file changes. Raises `ServingError` for a file that cannot be used.

    A file that is half-written or gone for a moment changes nothing. One that stays unreadable admits nobody after `GRACE_S`
    seconds, because it may have been changed to revoke a key. `clock` gives seconds.
    """

    def __init__(self, file: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = file
        self._clock = clock
        self._checked_at = clock()
        self._unreadable: tuple[float, str] | None = None  # since when (seconds), and why
        self.all = self._read()

    def owner(self, secret: str) -> ApiKey | None:
        """The entry of the key `secret`, or None. Every entry is compared, so that the time taken reveals nothing.

        Raises `ServingError` where the file has been unreadable for too long.
        """
        if self._clock() - self._checked_at > REFRESH_S:
            self._refresh()
        if self._unreadable is not None and self._clock() - self._unreadable[0] > GRACE_S:
            raise ServingError(self._unreadable[1])
        digest = hashlib.sha256(secret.encode(errors="replace")).hexdigest()
        owner = None
        for key in self.all:
            if hmac.compare_digest(digest, key.sha256):
                owner = key
        return owner

    def _refresh(self) -> None:
        self._checked_at = self._clock()
        try:
            if self._current_stamp() != self._stamp:
                self.all = self._read()
                log.info("the keys file was read again: %d keys", len(self.all))
            self._unreadable = None
        except (OSError, ServingError) as error:
            if self._unreadable is None or self._unreadable[1] != str(error):
                log.error("%s The keys as they were are taken for %g s, then none is.", error, GRACE_S)
            self._unreadable = (self._unreadable[0] if self._unreadable else self._clock(), str(error))

    def _current_stamp(self) -> tuple[int, int, int]:
        """(modification time in ns, size in bytes, inode) of the file, which changes when the file does.

        The time alone does not do: a copy may keep it, and Kubernetes replaces a secret by another link.
        """
        now = self._file.stat()
        return now.st_mtime_ns, now.st_size, now.st_ino

    def _read(self) -> tuple[ApiKey, ...]:
        try:
            stamp = self._current_stamp()
            entries = _KeysFile.model_validate(load_yaml(self._file.read_text()))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ServingError(
                f"the keys file {self._file} cannot be read ({error.__class__.__name__}); check {KEYS_FILE}."
            ) from error
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "the file"
            raise ServingError(
                f"the keys file {self._file}: {place}: {first['msg']}; `apprentice key NAME` makes an entry."
            ) from error
        names = [key.name for key in entries.keys]
        if doubles := sorted({name for name in names if names.count(name) > 1}):
            raise ServingError(f"the keys file {self._file} has two entries called {doubles[0]!r}; give each its own name.")
        self._stamp = stamp
        return entries.keys


def new_key(name: str) -> tuple[str, str]:
    """A new key and its YAML entry for the keys file; the key itself is stored nowhere."""
    key = _PREFIX + secrets.token_urlsafe(32)
    return key, yaml.safe_dump([{"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest()}], sort_keys=False)


def keys_file_of_environment() -> Path | None:
    """The keys file that the environment variable names, or None."""
    named = os.environ.get(KEYS_FILE)
    return Path(named).expanduser().absolute() if named else None


def check_guarded(host: str, *, insecure: bool = False, file: Path | None = None) -> Path | None:
    """The keys file that guards an endpoint on `host`: `file`, or the environment's; None if there is none.

    Raises `ServingError` for an address other than loopback without keys, unless `insecure`, and for an unusable keys file.
    """
    file = file or keys_file_of_environment()
    if not (_is_loopback(host) or file or insecure):
        raise ServingError(
            f"the host {host!r} is not this machine alone, and no keys guard the endpoint; name a keys file in {KEYS_FILE}"
            " (`apprentice key NAME` makes an entry) or as `keys_file` of the application, use 127.0.0.1, or let everybody in"
            " with --insecure, or `insecure: true` of the application."
        )
    if file is not None:
        ApiKeys(file)
    return file


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
