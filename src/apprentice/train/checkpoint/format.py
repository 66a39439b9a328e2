"""Checkpoint format, and finding, keeping and deleting checkpoints.

    <checkpoints>/step-000040.2/       after 40 steps, written by the worker group whose fence token is 2
      state.json                       training state (step, next packed row, token counts, ledger) and facts (dtype, tuning method)
      tensors-0003-00.safetensors …    what worker 3 holds: parts of the float32 weights and of the optimizer's state, flattened
      tensors-0003-00.safetensors.sha256   digests of that file in pieces
      index.json                       which bytes of which file hold which elements (`shard_index.py`)
      checksums.json                   sha256 of index.json and state.json; written last, so a folder without it is no checkpoint
      validation.json                  the loss of an asynchronous validation, written later
      in-use-<…>                       marker of a reader; the checkpoint is not deleted while there is one
      damaged                          a reader found other bytes than were written; the checkpoint is passed over

In format 1, of earlier versions, tensors-0001.safetensors … hold whole tensors, and checksums.json has all files.

    <checkpoints>/weights-000048.2/    the weights alone, after step 48, for an on-policy run's next replies; same files

A checkpoint counts once the run's fence lists it; in a run of an earlier version without a fence, once it has `checksums.json`. Its
content does not depend on the number of workers or the ZeRO stage.

"Whole" below means: all files are there in their size, and what describes them has its checksums. Tensors are verified when they
are read, in format 1 before. Reading a checkpoint raises `StorageError` if the store does not answer; a damaged one is logged as a
warning and passed over.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

from apprentice.errors import MissingError, StorageError
from apprentice.run.fence import committed_checkpoints
from apprentice.storage import Folder, with_retries
from apprentice.train.checkpoint.shard_index import ShardIndex
from apprentice.train.state import State

CHECKSUMS, INDEX, STATE, VALIDATION, DAMAGED = "checksums.json", "index.json", "state.json", "validation.json", "damaged"
STEP, WEIGHTS = "step", "weights"  # kinds of checkpoints, and beginnings of their folders' names
VALIDATION_AWAITED = "validation_awaited"  # fact of a checkpoint whose loss comes later, in validation.json
MOST_AWAITED = 3  # checkpoints kept until they are validated, beyond the usual number
WEIGHT = "weight"  # keys of weights are `weight/<parameter name>`, those of moments `exp_avg/<parameter name>` and so on
HASHED_BYTES = 1 << 24  # read at a time of a file that is verified whole
_PART, _IN_USE = ".part-", "in-use-"  # the former is of earlier versions
_NOT_UNDERSTOOD = (ValueError, KeyError, TypeError, AttributeError)  # errors of a file with unexpected content
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint: its folder, the training state, and facts saved with it."""

    folder: Folder
    state: State
    facts: dict[str, Any]  # dtype and tuning method (for an export on other hardware), whether its validation is awaited


class KeptRounds(NamedTuple):
    """Rounds of an on-policy run whose weights are kept: the last `rounds` of them, each of `steps` steps."""

    steps: int
    rounds: int

    def begins(self, step: int) -> set[int]:
        """The steps at which the rounds began that are kept at `step`."""
        return {(step // self.steps - back) * self.steps for back in range(self.rounds)}


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


def find_weights(checkpoints: Folder, step: int) -> Checkpoint | None:
    """The weights after `step` steps: a snapshot, or a whole checkpoint, as earlier versions had; None if there is neither."""
    for folder in _newest_first(checkpoints, WEIGHTS):
        if _age(folder)[0] == step and (snapshot := _whole(folder)):
            return snapshot
    return find_of_step(checkpoints, step)


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


def find_newest_step(checkpoints: Folder, kind: str = STEP) -> int:
    """Step of the newest checkpoint, or snapshot of the weights, even if it is damaged; 0 if there is none."""
    return next((_age(folder)[0] for folder in _newest_first(checkpoints, kind) if _is_there(folder / CHECKSUMS)), 0)


def prune(checkpoints: Folder, keep: int, newest: Checkpoint, rounds: KeptRounds | None = None) -> None:
    """Deletes old checkpoints. What cannot be deleted now is left; deleting never ends a run.

    Kept are `keep` checkpoints: `newest`, from which the run goes on, the best, and the newest of the others; where newest and best
    differ, both are kept even if `keep` is 1. Kept besides are the newest `MOST_AWAITED` that wait for their validation, all that
    are in use, and, with `rounds`, those whose models write the replies of on-policy rounds, since some of these may not be written
    yet. Checkpoints that are marked as damaged are deleted, and those later than `newest`,
    which were passed over as damaged.
    """
    try:
        folders = [folder for folder in _newest_first(checkpoints) if _age(folder) <= _age(newest.folder)]
        folders = [folder for folder in folders if not _is_there(folder / DAMAGED)]
        awaiting = [folder for folder in folders if _is_awaited(folder)]
        spared = {folder.name for folder in awaiting[:MOST_AWAITED]}
        lowest = _place_of_lowest([_validation_loss(folder) for folder in folders])
        order = dict.fromkeys([0, *([] if lowest is None else [lowest]), *range(len(folders))])
        spared |= {folders[place].name for place in list(order)[: max(keep, 2 if lowest else 1)]}
        if rounds is not None:
            begins = rounds.begins(_age(newest.folder)[0])
            spared |= {folder.name for folder in folders if _age(folder)[0] in begins}
        to_delete = [folder for folder in _newest_first(checkpoints) if folder.name not in spared and not _is_in_use(folder)]
    except StorageError as error:
        _log.warning("no old checkpoint is deleted now: %s", error)
        return
    for folder in to_delete:
        remove(folder)


def prune_weights(checkpoints: Folder, newest: Checkpoint, earliest: int) -> None:
    """Deletes the snapshots of weights but `newest` and those from step `earliest` on that are older than it.

    The rows that others wrote are there, since training has used them.
    """
    last = _age(newest.folder)[0]
    try:
        others = [folder for folder in _newest_first(checkpoints, WEIGHTS) if folder != newest.folder]
        to_delete = [folder for folder in others if not earliest <= _age(folder)[0] < last and not _is_in_use(folder)]
    except StorageError as error:
        _log.warning("no old weights are deleted now: %s", error)
        return
    for folder in to_delete:
        remove(folder)


def remove(folder: Folder) -> None:
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


def mark_damaged(checkpoint: Folder, reason: str) -> None:
    """Marks a checkpoint whose bytes are not those that were written, so that it is passed over from now on."""
    with suppress(OSError, StorageError):  # where no mark can be written, each reader finds the damage anew
        if (checkpoint / CHECKSUMS).exists():
            (checkpoint / DAMAGED).write_text(reason)


def _is_in_use(checkpoint: Folder) -> bool:
    return any(file.name.startswith(_IN_USE) for file in _children(checkpoint))


def delete_leftovers(checkpoints: Folder) -> None:
    """Deletes leftovers of earlier attempts: unfinished checkpoints, ones that do not count, marks of readers.

    Only the process that holds the run may call it, before workers start.
    """
    counted = committed_checkpoints(checkpoints.parent)
    for folder in _children(checkpoints):
        if not folder.name.startswith((f"{STEP}-", f"{WEIGHTS}-", _PART)):
            continue
        for mark in _children(folder):
            if mark.name.startswith(_IN_USE):
                _delete(mark)
        overtaken = counted is not None and folder.name not in counted
        if folder.name.startswith(_PART) or overtaken or not _is_there(folder / CHECKSUMS):
            remove(folder)


def _newest_first(checkpoints: Folder, kind: str = STEP) -> list[Folder]:
    counted = committed_checkpoints(checkpoints.parent)
    folders = [folder for folder in _children(checkpoints) if folder.name.startswith(f"{kind}-")]
    folders = [folder for folder in folders if counted is None or folder.name in counted]
    return sorted(folders, key=_age, reverse=True)


def _age(folder: Folder) -> tuple[int, int]:
    step, _, again = folder.name.partition("-")[2].partition(".")
    return int(step), int(again or 1)


def _children(folder: Folder) -> list[Folder]:
    return with_retries(folder, folder.children)


def _is_there(file: Folder) -> bool:
    return with_retries(file, file.exists)


def _json(file: Folder) -> Any:
    return json.loads(with_retries(file, file.read_bytes))


def _whole(folder: Folder) -> Checkpoint | None:
    """The checkpoint in `folder`; None, with a warning, if a file is missing, has another checksum or size, or cannot be parsed."""
    try:
        sums = _json(folder / CHECKSUMS)
        sizes = with_retries(folder, folder.sizes)
        damaged = [name for name, digest in sums.items() if _sha256(folder / name) != digest]
        if INDEX in sums and not damaged:
            files = ShardIndex.from_json(_json(folder / INDEX)).files
            damaged = [file.name for file in files if sizes.get(file.name) != file.bytes or file.digests_file not in sizes]
        content = _json(folder / STATE)
        if DAMAGED in sizes:
            damaged = [with_retries(folder, (folder / DAMAGED).read_text)]
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


def _sha256(file: Folder) -> str:
    def read() -> str:
        fs, path = file.filesystem()
        digest = hashlib.sha256()
        with fs.open_input_stream(path) as stream:
            while data := stream.read(HASHED_BYTES):
                digest.update(data)
        return digest.hexdigest()

    return with_retries(file, read)
