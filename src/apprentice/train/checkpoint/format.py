"""Checkpoints: float32 weights and moments by parameter name in safetensors, the state as JSON, and checksums.

    <checkpoints>/step-000040.2/  after 40 steps, by the workers whose token is 2
      state.json          step, next packed row, token counts, ledger counts, what the tensors belong to
      tensors-0001.safetensors …
      checksums.json      sha256 of every other file; written last, so a folder without it is no checkpoint
      validation.json     what came of validating it aside, later
      in-use-<…>          somebody reads it, and it is not deleted

A checkpoint counts when the run's fence says so, and before there was one, when it has its `checksums.json`. It does not depend on
the number of workers or the ZeRO stage. Knows nothing of Ray or DeepSpeed.
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
from apprentice.run.fence import Token, committed
from apprentice.storage import Folder, answer_of
from apprentice.train.state import State

CHECKSUMS, STATE, VALIDATION = "checksums.json", "state.json", "validation.json"
AWAITED = "validation_awaited"  # fact of a checkpoint whose validation loss comes later, in a file of its own
MOST_AWAITED = 3  # checkpoints that are kept until they are validated, though newer ones have come
SHARD_BYTES = 1 << 29  # of tensors held in memory before they are written
_PART, _IN_USE = ".part-", "in-use-"
_NOT_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError)  # of a file that is not what was written
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, how far the run was, and what else was saved with it."""

    folder: Folder
    state: State
    facts: dict[str, Any]  # dtype, tuning method: what is needed to export without asking the hardware again


def save(
    checkpoints: Folder, tensors: Iterable[tuple[str, Tensor]], state: State, facts: dict[str, Any], token: Token | None = None
) -> Checkpoint:
    """Writes one checkpoint, streaming `tensors`, and gives it back once it counts.

    It lies under the `token` of those who write it, `step-<n>.<token>`; without a fence it is `step-<n>`, or has a further number
    if that is taken. Raises `StorageError` where it cannot be written, such as on a full disk; nothing of it is left then. Raises
    `FencedError` if others have the run now; it does not count then.
    """
    try:
        name = f"step-{state.step:06d}.{token.writer}" if token else _free_name(checkpoints, state.step)
        target = checkpoints / name
        scratch = checkpoints.make().local if checkpoints.is_local else None  # on the same disk, so that it can be renamed
        with tempfile.TemporaryDirectory(prefix=_PART, dir=scratch, ignore_cleanup_errors=True) as folder:
            part = Path(folder)
            sums = {file.name: _sha256(file) for file in _write_tensors(part, tensors)}
            Folder.at(part / STATE).write_json({"state": state.to_json(), "facts": facts})
            sums[STATE] = _sha256(part / STATE)
            Folder.at(part / CHECKSUMS).write_json(sums)
            _publish(part, target)
        if token is not None:
            there = {folder.name for folder in _children(checkpoints)}
            token.commit(name, there.__contains__)
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
    held: dict[str, Tensor] = {}
    number = 0
    for key, tensor in tensors:
        held[key] = tensor.contiguous()
        if sum(value.nbytes for value in held.values()) >= SHARD_BYTES:
            number += 1
            yield _write_shard(part, number, held)
            held = {}
    if held:
        yield _write_shard(part, number + 1, held)


def _write_shard(part: Path, number: int, held: dict[str, Tensor]) -> Path:
    file = part / f"tensors-{number:04d}.safetensors"
    safetensors.torch.save_file(held, file)
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


def restorable(checkpoints: Folder) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none. Damaged ones are passed over with a warning.

    A store that does not answer is not damage: it raises `StorageError`, here and in all that reads checkpoints.
    """
    for folder in _newest_first(checkpoints):
        if found := _whole(folder):
            return found
    return None


def of_step(checkpoints: Folder, step: int) -> Checkpoint | None:
    """The whole checkpoint after so many steps; None while there is none."""
    for folder in _newest_first(checkpoints):
        if _age(folder)[0] == step and _is_there(folder / CHECKSUMS) and (found := _whole(folder)):
            return found
    return None


def named(checkpoints: Folder, name: str) -> Checkpoint | None:
    """The whole checkpoint in the folder of this name; None if it is not there any more."""
    folder = checkpoints / name
    return _whole(folder) if _is_there(folder / CHECKSUMS) else None


def awaited(checkpoints: Folder) -> list[Checkpoint]:
    """The whole checkpoints that are still to be validated, oldest first."""
    return [found for folder in reversed(_newest_first(checkpoints)) if _is_awaited(folder) and (found := _whole(folder))]


def note_validation(checkpoint: Checkpoint, loss: float | None) -> None:
    """Writes down what came of validating `checkpoint` aside, unless it has been deleted meanwhile."""
    if _is_there(checkpoint.folder / CHECKSUMS):
        (checkpoint.folder / VALIDATION).write_json({"validation_loss": loss})


def best(checkpoints: Folder) -> Checkpoint | None:
    """The whole checkpoint with the lowest validation loss (of equals the newest); without validation losses the newest.

    A loss that is no number is none.
    """
    found = [whole for folder in _newest_first(checkpoints) if (whole := _whole(folder))]
    place = _place_of_lowest([checkpoint.state.validation_loss for checkpoint in found])
    return found[place or 0] if found else None


def _place_of_lowest(losses: Sequence[float | None]) -> int | None:
    """Where the lowest loss stands (of equals the first); None where none of them is a number."""
    numbers = [(loss, place) for place, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
    return min(numbers)[1] if numbers else None


def newest_step(checkpoints: Folder) -> int:
    """Steps of the newest checkpoint, whether or not it is damaged; 0 while there is none."""
    return next((_age(folder)[0] for folder in _newest_first(checkpoints) if _is_there(folder / CHECKSUMS)), 0)


def prune(checkpoints: Folder, keep: int, newest: Checkpoint, round_steps: int | None = None) -> None:
    """Leaves `newest`, from which the run goes on, the best, and of the others the newest, `keep` in all (2 if those two differ).

    With `round_steps`, the steps of an on-policy round, that which wrote the round of `newest` is left besides: what is not yet
    written of the round needs it.
    Those that sort after `newest` were passed over as damaged, and are the first to go. Those that wait for their validation are
    left besides, `MOST_AWAITED` at most, and whatever is in use. Deleting never ends a run: what cannot be deleted is left.
    """
    try:
        folders = [folder for folder in _newest_first(checkpoints) if _age(folder) <= _age(newest.folder)]
        waiting = [folder for folder in folders if _is_awaited(folder)]
        spared = {folder.name for folder in waiting[:MOST_AWAITED]}
        lowest = _place_of_lowest([_validation_loss(folder) for folder in folders])
        chosen = dict.fromkeys([0, *([] if lowest is None else [lowest]), *range(len(folders))])
        spared |= {folders[place].name for place in list(chosen)[: max(keep, 2 if lowest else 1)]}
        if round_steps is not None:
            begun = _age(newest.folder)[0] // round_steps * round_steps
            spared |= {folder.name for folder in folders if _age(folder)[0] == begun}
        old = [folder for folder in _newest_first(checkpoints) if folder.name not in spared and not _is_in_use(folder)]
    except StorageError as error:
        _log.warning("no old checkpoint is deleted now: %s", error)
        return
    for folder in old:
        _remove(folder)


def _remove(folder: Folder) -> None:
    """Deletes a checkpoint, its checksums first, so that half of a deletion leaves no checkpoint.

    Who began to read it before the checksums went may read on.
    """
    _delete(folder / CHECKSUMS)
    if not _is_in_use(folder):
        _delete(folder)


def _delete(place: Folder) -> None:
    """Deletes a file or a folder, if that is possible.

    What is left, such as the `.nfs…` that NFS makes of a file that somebody has open, the next `sweep` takes.
    """
    try:
        place.delete()
    except (OSError, StorageError) as error:
        _log.warning("%s cannot be deleted now (%s); the next start of the run tries again", place, error)


@contextmanager
def in_use(checkpoint: Folder) -> Iterator[None]:
    """Keeps `prune` from deleting a checkpoint while somebody reads it."""
    mark = checkpoint / f"{_IN_USE}{uuid.uuid4().hex[:8]}"
    with suppress(OSError, StorageError):  # a folder that cannot be written to is not deleted either
        if (checkpoint / CHECKSUMS).exists():
            mark.write_bytes(b"")
    try:
        yield
    finally:
        with suppress(OSError, StorageError):
            mark.delete()


def _is_in_use(checkpoint: Folder) -> bool:
    return any(file.name.startswith(_IN_USE) for file in _children(checkpoint))


def sweep(checkpoints: Folder) -> None:
    """Removes what attempts left behind that are over: half of a checkpoint, one that does not count, marks of readers.

    Only who holds the run may call it, before workers begin.
    """
    counted = committed(checkpoints.parent)
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
    counted = committed(checkpoints.parent)
    folders = [folder for folder in _children(checkpoints) if folder.name.startswith("step-")]
    folders = [folder for folder in folders if counted is None or folder.name in counted]
    return sorted(folders, key=_age, reverse=True)


def _age(folder: Folder) -> tuple[int, int]:
    step, _, again = folder.name.removeprefix("step-").partition(".")
    return int(step), int(again or 1)


def _children(folder: Folder) -> list[Folder]:
    return answer_of(folder, folder.children)


def _is_there(file: Folder) -> bool:
    return answer_of(file, file.exists)


def _json(file: Folder) -> Any:
    return json.loads(answer_of(file, file.read_bytes))


def _whole(folder: Folder) -> Checkpoint | None:
    """The checkpoint in `folder`; None, with a warning, where a file is missing, has another checksum, or cannot be parsed."""
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
        return bool(_json(folder / STATE)["facts"].get(AWAITED)) and not _is_there(folder / VALIDATION)
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
def tensors_of(checkpoint: Checkpoint) -> Iterator[Callable[[str], Tensor]]:
    """Gives a function from key to tensor; the files are read tensor by tensor."""
    with tempfile.TemporaryDirectory() as scratch, in_use(checkpoint.folder):
        folder = checkpoint.folder.local if checkpoint.folder.is_local else checkpoint.folder.download(Path(scratch))
        files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            files.update(dict.fromkeys(_names(path), safe_open(path, framework="pt")))
        yield lambda key: files[key].get_tensor(key)


def keys_of(checkpoint: Checkpoint) -> list[str]:
    """The keys of all tensors in `checkpoint`."""
    with tempfile.TemporaryDirectory() as scratch, in_use(checkpoint.folder):
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
    return answer_of(file, read)
