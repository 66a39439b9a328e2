"""Checkpoints: float32 weights and moments by parameter name in safetensors, the state as JSON, and checksums.

    <checkpoints>/step-000040/
      state.json          step, next packed row, token counts, ledger counts, what the tensors belong to
      tensors-0001.safetensors …
      checksums.json      sha256 of every other file; written last, so a folder without it is no checkpoint
      validation.json     what came of validating it aside, later

A checkpoint is whole or absent: on a local disk it is renamed into place, elsewhere `checksums.json` makes it count. It does not
depend on the number of workers or the ZeRO stage. Knows nothing of Ray or DeepSpeed.
"""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from apprentice.errors import StorageError
from apprentice.storage import Folder
from apprentice.train.state import State

CHECKSUMS, STATE, VALIDATION = "checksums.json", "state.json", "validation.json"
AWAITED = "validation_awaited"  # fact of a checkpoint whose validation loss comes later, in a file of its own
MOST_AWAITED = 3  # checkpoints that are kept until they are validated, though newer ones have come
SHARD_BYTES = 1 << 29  # of tensors held in memory before they are written
_PART = ".part-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, how far the run was, and what else was saved with it."""

    folder: Folder
    state: State
    facts: dict[str, Any]  # dtype, tuning method: what is needed to export without asking the hardware again


def save(checkpoints: Folder, tensors: Iterable[tuple[str, Tensor]], state: State, facts: dict[str, Any]) -> Checkpoint:
    """Writes one checkpoint, streaming `tensors`, and gives it back once it is whole.

    The name is `step-<n>`; a step that is saved again (after a damaged checkpoint) gets a name of its own. Raises `StorageError`
    where it cannot be written, such as on a full disk; nothing of it is left then.
    """
    target = checkpoints / _free_name(checkpoints, state.step)
    scratch = checkpoints.make().local if checkpoints.is_local else None  # on the same disk, so that it can be renamed
    try:
        with tempfile.TemporaryDirectory(prefix=_PART, dir=scratch, ignore_cleanup_errors=True) as folder:
            part = Path(folder)
            sums = {file.name: _sha256(file) for file in _write_tensors(part, tensors)}
            Folder.at(part / STATE).write_json({"state": state.to_json(), "facts": facts})
            sums[STATE] = _sha256(part / STATE)
            Folder.at(part / CHECKSUMS).write_json(sums)
            _publish(part, target)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"the checkpoint of step {state.step} cannot be written to {checkpoints} ({reason})") from error
    return Checkpoint(target, state, facts)


def _free_name(checkpoints: Folder, step: int) -> str:
    taken = {folder.name for folder in checkpoints.children()}
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
    for file in sorted(part.iterdir(), key=lambda file: file.name == CHECKSUMS):
        (target / file.name).upload(file)


def restorable(checkpoints: Folder) -> Checkpoint | None:
    """The newest whole checkpoint; None if there is none. Damaged ones are passed over with a warning."""
    for folder in _newest_first(checkpoints):
        if found := _whole(folder):
            return found
    return None


def of_step(checkpoints: Folder, step: int) -> Checkpoint | None:
    """The whole checkpoint after so many steps; None while there is none."""
    for folder in _newest_first(checkpoints):
        if _age(folder)[0] == step and (folder / CHECKSUMS).exists() and (found := _whole(folder)):
            return found
    return None


def named(checkpoints: Folder, name: str) -> Checkpoint | None:
    """The whole checkpoint in the folder of this name; None if it is not there any more."""
    folder = checkpoints / name
    return _whole(folder) if (folder / CHECKSUMS).exists() else None


def awaited(checkpoints: Folder) -> list[Checkpoint]:
    """The whole checkpoints that are still to be validated, oldest first."""
    return [found for folder in reversed(_newest_first(checkpoints)) if _is_awaited(folder) and (found := _whole(folder))]


def note_validation(checkpoint: Checkpoint, loss: float | None) -> None:
    """Writes down what came of validating `checkpoint` aside."""
    (checkpoint.folder / VALIDATION).write_json({"validation_loss": loss})


def best(checkpoints: Folder) -> Checkpoint | None:
    """The whole checkpoint with the lowest validation loss (of equals the newest); without validation losses the newest."""
    found = [whole for folder in _newest_first(checkpoints) if (whole := _whole(folder))]
    scored = [(checkpoint.state.validation_loss, checkpoint) for checkpoint in found]
    losses = [(loss, place) for place, (loss, _) in enumerate(scored) if loss is not None]
    return found[min(losses)[1]] if losses else next(iter(found), None)


def prune(checkpoints: Folder, keep: int) -> None:
    """Leaves the newest checkpoint, the best, and of the others the newest, `keep` in all (2 if those two differ).

    Those that wait for their validation are left besides, `MOST_AWAITED` at most.
    """
    waiting = [folder for folder in _newest_first(checkpoints) if _is_awaited(folder)]
    spared = {folder.name for folder in waiting[:MOST_AWAITED]}
    folders = _newest_first(checkpoints)
    losses = [(loss, place) for place, folder in enumerate(folders) if (loss := _validation_loss(folder)) is not None]
    chosen = dict.fromkeys([0, *([min(losses)[1]] if losses else []), *range(len(folders))])
    kept = set(list(chosen)[: max(keep, 2 if losses and min(losses)[1] != 0 else 1)])
    for place, folder in enumerate(folders):
        if place not in kept and folder.name not in spared:
            (folder / CHECKSUMS).delete()  # first, so that half of a deletion leaves no checkpoint
            folder.delete()


def sweep(checkpoints: Folder) -> None:
    """Removes what interrupted saves left behind. Call it while nobody saves."""
    for folder in checkpoints.children():
        if folder.name.startswith(_PART) or (folder.name.startswith("step-") and not (folder / CHECKSUMS).exists()):
            folder.delete()


def _newest_first(checkpoints: Folder) -> list[Folder]:
    folders = [folder for folder in checkpoints.children() if folder.name.startswith("step-")]
    return sorted(folders, key=_age, reverse=True)


def _age(folder: Folder) -> tuple[int, int]:
    step, _, again = folder.name.removeprefix("step-").partition(".")
    return int(step), int(again or 1)


def _whole(folder: Folder) -> Checkpoint | None:
    try:
        sums = (folder / CHECKSUMS).read_json()
        damaged = [name for name, digest in sums.items() if _folder_sha256(folder / name) != digest]
        content = (folder / STATE).read_json()
        if not damaged and STATE in sums:
            state = State.from_json(content["state"])
            if (folder / VALIDATION).exists():
                state.validation_loss = (folder / VALIDATION).read_json()["validation_loss"]
            return Checkpoint(folder, state, content["facts"])
        reason = f"{', '.join(damaged)} changed since it was written"
    except (StorageError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error)
    _log.warning("checkpoint %s is damaged (%s) and is passed over", folder, reason)
    return None


def _is_awaited(folder: Folder) -> bool:
    try:
        return bool((folder / STATE).read_json()["facts"].get(AWAITED)) and not (folder / VALIDATION).exists()
    except (StorageError, OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _validation_loss(folder: Folder) -> float | None:
    try:
        late = (folder / VALIDATION).exists()
        loss = ((folder / VALIDATION).read_json() if late else (folder / STATE).read_json()["state"])["validation_loss"]
    except (StorageError, OSError, ValueError, KeyError, TypeError):
        return None
    return None if loss is None else float(loss)


@contextmanager
def tensors_of(checkpoint: Checkpoint) -> Iterator[Callable[[str], Tensor]]:
    """Gives a function from key to tensor; the files are read tensor by tensor."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint.folder.local if checkpoint.folder.is_local else checkpoint.folder.download(Path(scratch))
        files: dict[str, Any] = {}
        for path in sorted(folder.glob("*.safetensors")):
            files.update(dict.fromkeys(_names(path), safe_open(path, framework="pt")))
        yield lambda key: files[key].get_tensor(key)


def keys_of(checkpoint: Checkpoint) -> list[str]:
    """The keys of all tensors in `checkpoint`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = checkpoint.folder.local if checkpoint.folder.is_local else checkpoint.folder.download(Path(scratch))
        return [key for path in sorted(folder.glob("*.safetensors")) for key in _names(path)]


def _names(path: Path) -> list[str]:
    file: Any = safe_open(path, framework="pt")
    return list(file.keys())


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder_sha256(file: Folder) -> str:
    if file.is_local:
        return _sha256(file.local)
    return hashlib.sha256(file.read_bytes()).hexdigest()
