"""Checkpoint format: float32 weights and optimizer moments by parameter name in safetensors, the state as JSON, checksums.

    <checkpoints>/step-000040.2/  after 40 steps, written by the worker group whose fence token is 2
      state.json          training state (step, next packed row, token counts, ledger) and facts (dtype, tuning method)
      tensors-0001.safetensors …
      checksums.json      sha256 of the files above; written last, so a folder without it is no checkpoint
      validation.json     the loss of an asynchronous validation, written later
      in-use-<…>          marker of a reader; the checkpoint is not deleted while there is one

A checkpoint counts once the run's fence lists it; in a run of an earlier version without a fence, once it has `checksums.json`. Its
content does not depend on the number of workers or the ZeRO stage.

"Whole" below means: all files are there and have their checksums. Reading a checkpoint raises `StorageError` if the store does not
answer; a damaged one is logged as a warning and passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apprentice.errors import MissingError, StorageError
from apprentice.run.fence import FenceToken, committed_checkpoints
from apprentice.storage import Folder, with_retries
from apprentice.train.state import State

CHECKSUMS, STATE, VALIDATION = "checksums.json", "state.json", "validation.json"
VALIDATION_AWAITED = "validation_awaited"  # fact of a checkpoint whose loss comes later, in validation.json
MOST_AWAITED = 3  # checkpoints kept until they are validated, beyond the usual number
WEIGHT = "weight"  # keys of weights are `weight/<parameter name>`, those of moments `exp_avg/<parameter name>` and so on
SHARD_BYTES = 1 << 29  # size of a tensors file, which is collected in memory first
_PART, _IN_USE = ".part-", "in-use-"
_NOT_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError)  # errors of a file with unexpected content
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the training state, and facts saved with it."""

    folder: Folder
    state: State
    facts: dict[str, Any]  # dtype and tuning method (for an export on other hardware), whether its validation is awaited


def write_checkpoint(
    checkpoints: Folder, tensors: Iterable[tuple[str, Tensor]], state: State, facts: dict[str, Any], token: FenceToken | None = None
) -> Checkpoint:
    """Writes one checkpoint, streaming `tensors` (key, tensor), and returns it once it counts.

    Its folder is `step-<n>.<token>`; without a token `step-<n>`, or `step-<n>.<k>` if that is taken. Raises `StorageError` if it
    cannot be written, such as on a full disk. Raises `FencedError` if another process has taken the run; then it does not count.
    """
    try:
        name = f"step-{state.step:06d}.{token.writer}" if token else _free_name(checkpoints, state.step)
        target = checkpoints / name
        scratch = checkpoints.make().local if checkpoints.is_local else None  # on the same disk, so that a rename is enough
        with tempfile.TemporaryDirectory(prefix=_PART, dir=scratch, ignore_cleanup_errors=True) as folder:
            part = Path(folder)
            sums = {file.name: _sha256(file) for file in _write_tensors(part, tensors)}
            Folder.at(part / STATE).write_json({"state": state.to_json(), "facts": facts})
            sums[STATE] = _sha256(part / STATE)
            Folder.at(part / CHECKSUMS).write_json(sums)
            _publish(part, target)
        if token is not None:
            existing = {folder.name for folder in _children(checkpoints)}
            token.commit(name, existing.__contains__)
    except (OSError, SafetensorError, StorageError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"the checkpoint of step {state.step} cannot be written to {checkpoints} ({reason})") from error
    return Checkpoint(target, state, facts)


def _free_name(checkpoints: Folder, step: int) -> str:
    taken = {folder.name for folder in _children(checkpoints)}
    name, number = f"step-{step:06d}", 1
    while name in taken:
        number += 1
        name = f"step-{step:06d}.{number}"
    return name


def _write_tensors(part: Path, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[Path]:
    """Writes shards of about `SHARD_BYTES`; yields each file once it is written."""
    shard: dict[str, Tensor] = {}
    number = 0
    for key, tensor in tensors:
        shard[key] = tensor.contiguous()
        if sum(value.nbytes for value in shard.values()) >= SHARD_BYTES:
            number += 1
            yield _write_shard(part, number, shard)
            shard = {}
    if shard:
        yield _write_shard(part, number + 1, shard)


def _write_shard(part: Path, number: int, tensors: dict[str, Tensor]) -> Path:
    file = part / f"tensors-{number:04d}.safetensors"
    safetensors.torch.save_file(tensors, file)
    return file


def _publish(part: Path, target: Folder) -> None:
    if target.is_local:
        os.replace(part, target.local)
        return
    try:
        for file in sorted(part.iterdir(), key=lambda file: file.name == CHECKSUMS):
            (target / file.name).upload(file)
    except OSError:
        _remove(target)
        raise


def find_newest(checkpoints: Folder) -> Checkpoint | None:
    """The newest whole checkpoint, from which a run goes on; None if there is none."""
    for folder in _newest_first(checkpoints):
        if checkpoint := _whole(folder):
            return checkpoint
    return None


def find_of_step(checkpoints: Folder, step: int) -> Checkpoint | None:
    """The whole checkpoint after `step` steps; None if there is none."""
    for folder in _newest_first(checkpoints):
        if _age(folder)[0] == step and _is_there(folder / CHECKSUMS) and (checkpoint := _whole(folder)):
            return checkpoint
    return None


def find_named(checkpoints: Folder, name: str) -> Checkpoint | None:
    """The whole checkpoint in the folder `name`; None if it has been deleted or is damaged."""
    folder = checkpoints / name
    return _whole(folder) if _is_there(folder / CHECKSUMS) else None


def find_awaiting_validation(checkpoints: Folder) -> list[Checkpoint]:
    """The whole checkpoints whose asynchronous validation is not done, oldest first."""
    return [checkpoint for folder in reversed(_newest_first(checkpoints)) if _is_awaited(folder) and (checkpoint := _whole(folder))]


def record_validation(checkpoint: Checkpoint, loss: float | None) -> None:
    """Writes the loss of an asynchronous validation (None without validation rows), unless `checkpoint` was deleted meanwhile."""
    if _is_there(checkpoint.folder / CHECKSUMS):
        (checkpoint.folder / VALIDATION).write_json({"validation_loss": loss})


def find_best(checkpoints: Folder) -> Checkpoint | None:
    """The whole checkpoint with the lowest validation loss, the newest of equals; without any losses the newest.

    A loss that is not finite does not count.
    """
    whole_checkpoints = [checkpoint for folder in _newest_first(checkpoints) if (checkpoint := _whole(folder))]
    best = _place_of_lowest([checkpoint.state.validation_loss for checkpoint in whole_checkpoints])
    return whole_checkpoints[best or 0] if whole_checkpoints else None


def _place_of_lowest(losses: Sequence[float | None]) -> int | None:
    """Index of the lowest finite loss, the first of equals; None if there is none."""
    numbers = [(loss, place) for place, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return min(numbers)[1] if numbers else None


def find_newest_step(checkpoints: Folder) -> int:
    """Step of the newest checkpoint, even if it is damaged; 0 if there is none."""
    return next((_age(folder)[0] for folder in _newest_first(checkpoints) if _is_there(folder / CHECKSUMS)), 0)


def prune(checkpoints: Folder, keep: int, newest: Checkpoint, round_steps: int | None = None) -> None:
    """Deletes old checkpoints. What cannot be deleted now is left; deleting never ends a run.

    Kept are `keep` checkpoints: `newest`, from which the run goes on, the best, and the newest of the others; where newest and best
    differ, both are kept even if `keep` is 1. Kept besides are the newest `MOST_AWAITED` that wait for their validation, all that
    are in use, and, with `round_steps` (the steps of an on-policy round), the one whose model writes the current round's replies,
    since some of these may not be written yet. Checkpoints later than `newest` were passed over as damaged and are deleted.
    """
    try:
        folders = [folder for folder in _newest_first(checkpoints) if _age(folder) <= _age(newest.folder)]
        awaiting = [folder for folder in folders if _is_awaited(folder)]
        spared = {folder.name for folder in awaiting[:MOST_AWAITED]}
        lowest = _place_of_lowest([_validation_loss(folder) for folder in folders])
        order = dict.fromkeys([0, *([] if lowest is None else [lowest]), *range(len(folders))])
        spared |= {folders[place].name for place in list(order)[: max(keep, 2 if lowest else 1)]}
        if round_steps is not None:
            round_start = _age(newest.folder)[0] // round_steps * round_steps
            spared |= {folder.name for folder in folders if _age(folder)[0] == round_start}
        to_delete = [folder for folder in _newest_first(checkpoints) if folder.name not in spared and not _is_in_use(folder)]
    except StorageError as error:
        _log.warning("no old checkpoint is deleted now: %s", error)
        return
    for folder in to_delete:
        _remove(folder)


def _remove(folder: Folder) -> None:
    """Deletes a checkpoint, its checksums first, so that a half-deleted folder is no checkpoint.

    If a reader marked it in the meantime, or the store does not say, the other files stay until a later `delete_leftovers`.
    """
    _delete(folder / CHECKSUMS)
    try:
        is_in_use = _is_in_use(folder)
    except StorageError as error:
        _log.warning("%s is not deleted now: %s", folder, error)
        return
    if not is_in_use:
        _delete(folder)


def _delete(place: Folder) -> None:
    """Deletes a file or folder; if that fails, logs a warning.

    The next `delete_leftovers` tries again, such as for the `.nfs…` file that NFS leaves of a deleted file that is still open.
    """
    try:
        place.delete()
    except (OSError, StorageError) as error:
        _log.warning("%s cannot be deleted now (%s); the next start of the run tries again", place, error)


@contextmanager
def mark_in_use(checkpoint: Folder) -> Iterator[None]:
    """Marks a checkpoint as being read, so that `prune` does not delete it."""
    mark = checkpoint / f"{_IN_USE}{uuid.uuid4().hex[:8]}"
    with suppress(OSError, StorageError):  # where no mark can be written, nothing can be deleted either
        if (checkpoint / CHECKSUMS).exists():
            mark.write_bytes(b"")
    try:
        yield
    finally:
        with suppress(OSError, StorageError):
            mark.delete()


def _is_in_use(checkpoint: Folder) -> bool:
    return any(file.name.startswith(_IN_USE) for file in _children(checkpoint))


def delete_leftovers(checkpoints: Folder) -> None:
    """Deletes leftovers of earlier attempts: unfinished checkpoints, ones that do not count, marks of readers.

    Only the process that holds the run may call it, before workers start.
    """
    counted = committed_checkpoints(checkpoints.parent)
    for folder in _children(checkpoints):
        if not folder.name.startswith(("step-", _PART)):
            continue
        for mark in _children(folder):
            if mark.name.startswith(_IN_USE):
                _delete(mark)
        overtaken = counted is not None and folder.name not in counted
        if folder.name.startswith(_PART) or overtaken or not _is_there(folder / CHECKSUMS):
            _remove(folder)


def _newest_first(checkpoints: Folder) -> list[Folder]:
    counted = committed_checkpoints(checkpoints.parent)
    folders = [folder for folder in _children(checkpoints) if folder.name.startswith("step-")]
    folders = [folder for folder in folders if counted is None or folder.name in counted]
    return sorted(folders, key=_age, reverse=True)


def _age(folder: Folder) -> tuple[int, int]:
    step, _, again = folder.name.removeprefix("step-").partition(".")
    return int(step), int(again or 1)


def _children(folder: Folder) -> list[Folder]:
    return with_retries(folder, folder.children)


def _is_there(file: Folder) -> bool:
    return with_retries(file, file.exists)


def _json(file: Folder) -> Any:
    return json.loads(with_retries(file, file.read_bytes))


def _whole(folder: Folder) -> Checkpoint | None:
    """The checkpoint in `folder`; None, with a warning, if a file is missing, has another checksum, or cannot be parsed."""
    try:
        sums = _json(folder / CHECKSUMS)
        damaged = [name for name, digest in sums.items() if _folder_sha256(folder / name) != digest]
        content = _json(folder / STATE)
        if not damaged and STATE in sums:
            state = State.from_json(content["state"])
            if _is_there(folder / VALIDATION):
                state.validation_loss = _json(folder / VALIDATION)["validation_loss"]
            return Checkpoint(folder, state, content["facts"])
        reason = f"{', '.join(damaged)} changed since it was written"
    except (MissingError, *_NOT_UNDERSTOOD) as error:
        reason = str(error)
    _log.warning("checkpoint %s is damaged (%s) and is passed over", folder, reason)
    return None


def _is_awaited(folder: Folder) -> bool:
    try:
        return bool(_json(folder / STATE)["facts"].get(VALIDATION_AWAITED)) and not _is_there(folder / VALIDATION)
    except (MissingError, *_NOT_UNDERSTOOD):
        return False


def _validation_loss(folder: Folder) -> float | None:
    try:
        late = _is_there(folder / VALIDATION)
        loss = (_json(folder / VALIDATION) if late else _json(folder / STATE)["state"])["validation_loss"]
    except (MissingError, *_NOT_UNDERSTOOD):
        return None
    return None if loss is None else float(loss)


@contextmanager
def open_tensors(checkpoint: Checkpoint) -> Iterator[Callable[[str], Tensor]]:
    """Context with a function key → float32 tensor, which reads one tensor at a time.

    A checkpoint in an object store is first downloaded into a temporary folder.
    """
    with tempfile.TemporaryDirectory() as scratch, mark_in_use(checkpoint.folder):
        folder = checkpoint.folder.local if checkpoint.folder.is_local else checkpoint.folder.download(Path(scratch))
        files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            files.update(dict.fromkeys(_names(path), safe_open(path, framework="pt")))
        yield lambda key: files[key].get_tensor(key)


def list_keys(checkpoint: Checkpoint) -> list[str]:
    """The keys of all tensors in `checkpoint`."""
    with tempfile.TemporaryDirectory() as scratch, mark_in_use(checkpoint.folder):
        folder = checkpoint.folder.local if checkpoint.folder.is_local else checkpoint.folder.download(Path(scratch))
        return [key for path in sorted(folder.glob("*.safetensors")) for key in _names(path)]


def _names(path: Path) -> list[str]:
    file: Any = safe_open(path, framework="pt")
    return list(file.keys())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_sha256(file: Folder) -> str:
    read = (lambda: _sha256(file.local)) if file.is_local else (lambda: hashlib.sha256(file.read_bytes()).hexdigest())
    return with_retries(file, read)
