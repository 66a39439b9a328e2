"""Async saver: each worker copies its shards of the state and writes them to storage while training goes on.

    training thread   step 8 │ save: settle, copy │ step 9 │ step 10 │ settle: register │ step 11
    writing thread                                └ write, wait for the others, commit, prune ┘

Example: two workers save after step 8, and writing takes one and a half steps.

    save(8)      both wait for the save before, copy their shards to host memory (1 s for 10 GB) and go on with step 9
    in a thread  both write their files into `step-000008.1`; worker 0 adds the index, commits, and deletes the oldest checkpoint
    after 9      worker 0 has not saved yet, so nothing happens
    after 10     both have (`has_saved`): both call `settle`, which registers the checkpoint with Ray Train

Where memory has no room for the copies, the save is done before step 9. A checkpoint that cannot be written is reported, and the
next one is tried as usual; only the last one must succeed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from apprentice.errors import StorageError
from apprentice.run.fence import FenceToken
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.shard import Shard, has_room_for_copies
from apprentice.train.checkpoint.shard_writer import write_checkpoint
from apprentice.train.engine.collectives import Collectives
from apprentice.train.memory.measure import free_memory
from apprentice.train.state import State

MOST_OF_FREE_MEMORY = 0.5  # share of it that copies may take; what is larger is written while training waits


class _SaveResult(NamedTuple):
    """Result of a save: exactly one of the two is set on the first worker, none on the others."""

    checkpoint: Checkpoint | None
    failure: StorageError | None


class AsyncSaver:
    """Saves checkpoints into `folder`, where the newest and best `keep` are kept. Every worker must create one.

    facts        stored in every checkpoint
    report       called on the first worker, from the writing thread: `report(state, message=…)` for a checkpoint that could not be
                 written; `report(state, saved_s=…, blocked_s=…)` with the seconds that one took and that training waited for it
    register     called on all workers for every save, by `settle`: with the checkpoint on the first worker and None on the others,
                 or with None on all if it could not be written
    kept_rounds  rounds of an on-policy run: the checkpoints at which the current ones began are kept too
    token        the first worker's right to commit; once another process has taken the run, a save ends in `FencedError`
    """

    def __init__(
        self,
        folder: Folder,
        keep: int,
        facts: dict[str, Any],
        *,
        collectives: Collectives,
        report: Callable[..., None],
        register: Callable[[Checkpoint | None, State], None],
        kept_rounds: checkpoints.KeptRounds | None = None,
        token: FenceToken | None = None,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._kept_rounds = kept_rounds
        self._facts = facts
        self._report = report
        self._token = token
        self._register = register
        self._collectives = collectives
        self._writers = Collectives()  # a group of its own, for the thread
        self._thread = ThreadPoolExecutor(1, "apprentice-checkpoint")
        self._pending: tuple[State, Future[_SaveResult]] | None = None  # the last save that was not settled

    def save(self, state: State, shards: Sequence[Shard], *, last: bool) -> None:
        """Starts saving a checkpoint of all workers' `shards`. All workers must call it.

        The `last` one is waited for. Raises `StorageError` on the first worker if that cannot be written.
        """
        begin = time.perf_counter()
        self.settle()
        state = copy.deepcopy(state)  # training changes the original
        result: Future[_SaveResult] = Future()
        if has_room_for_copies(shards, self._collectives, MOST_OF_FREE_MEMORY * free_memory()):
            copies = [shard.copy_to_host() for shard in shards]
            result = self._thread.submit(self._write, copies, state, begin, time.perf_counter() - begin, last)
        else:
            result.set_result(self._write(shards, state, begin, None, last))
        self._pending = (state, result)
        if last and (failure := self.settle()) is not None:
            raise failure

    def close(self) -> None:
        """Waits for the checkpoint being written, so that a run that stops now does not lose it."""
        self._thread.shutdown(wait=True)

    def has_saved(self) -> bool:
        """Whether a save is over and not yet settled."""
        return self._pending is not None and self._pending[1].done()

    def settle(self) -> StorageError | None:
        """Waits for the last save and registers its result; returns the error if it failed. All workers must call it."""
        if self._pending is None:
            return None
        state, writing = self._pending
        self._pending = None
        result = writing.result()
        self._register(result.checkpoint, state)
        return result.failure

    def _write(self, shards: Sequence[Shard], state: State, begin: float, blocked_s: float | None, last: bool) -> _SaveResult:
        try:
            checkpoint = write_checkpoint(self._folder, shards, state, self._facts, self._token, collectives=self._writers)
        except StorageError as error:
            return _SaveResult(None, self._explain(error, state, last))
        if checkpoint is not None:
            checkpoints.prune(self._folder, self._keep, checkpoint, self._kept_rounds)
            saved_s = time.perf_counter() - begin
            self._report(state, saved_s=saved_s, blocked_s=saved_s if blocked_s is None else blocked_s)
        return _SaveResult(checkpoint, None)

    def _explain(self, failure: StorageError, state: State, last: bool) -> StorageError:
        """Reports a failed save; returns the error of the `last` one with the checkpoint that there is instead."""
        try:
            newest = checkpoints.find_newest(self._folder)
            other = f"the last whole checkpoint is that of step {newest.state.step}" if newest else "there is no other checkpoint"
        except StorageError:
            other = "which other checkpoints there are cannot be read either"
        if last:
            return StorageError(f"{failure}; {other}. Make room there and train again: it goes on from that.")
        self._report(state, message=f"{failure}; {other}. Training goes on, and the next checkpoint is tried as usual.")
        return failure
