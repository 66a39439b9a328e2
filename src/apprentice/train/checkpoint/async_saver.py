"""Async saver: each worker copies its shards of the state; the first worker gathers and writes them while training goes on.

    training thread   step │ save: settle the one before, copy │ step │ step │ settle: register │ step
    writing thread                                             └ gather, write, prune ┘

A checkpoint that cannot be written is reported, and the next one is tried as usual; only the last one must succeed. All workers
take part in gathering, even if the first one cannot write.
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
from apprentice.train.checkpoint.shard_gather import Shard, ShardGatherer, room_for_copies
from apprentice.train.engine.collectives import Collectives
from apprentice.train.memory.measure import free_memory
from apprentice.train.state import State

MOST_OF_FREE_MEMORY = 0.5  # share of it that copies may take; what is larger is written while training waits


class _Written(NamedTuple):
    """Result of a save: exactly one of the two is set on the first worker, none on the others."""

    checkpoint: Checkpoint | None
    failure: StorageError | None


class AsyncSaver:
    """Saves checkpoints into `folder`, where the newest and best `keep` are kept. Every worker must create one.

    facts        stored in every checkpoint
    tell         called on the first worker, from the writing thread: `tell(state, message=…)` for a checkpoint that could not be
                 written; `tell(state, saved_s=…, blocked_s=…)` with the seconds that one took and that training waited for it
    register     called on all workers for every save, by `settle`: with the checkpoint on the first worker and None on the others,
                 or with None on all if it could not be written
    round_steps  steps of an on-policy round: the checkpoint at which the current round began is kept too
    token        the first worker's right to commit; once another process has taken the run, a save ends in `FencedError`
    """

    def __init__(
        self,
        folder: Folder,
        keep: int,
        facts: dict[str, Any],
        *,
        collectives: Collectives,
        tell: Callable[..., None],
        register: Callable[[Checkpoint | None, State], None],
        round_steps: int | None = None,
        token: FenceToken | None = None,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._round_steps = round_steps
        self._facts = facts
        self._tell = tell
        self._token = token
        self._register = register
        self._collectives = collectives
        self._gathering = ShardGatherer(collectives)
        self._thread = ThreadPoolExecutor(1, "apprentice-checkpoint")
        self._pending: tuple[State, Future[_Written]] | None = None  # the last save that was not settled

    def save(self, state: State, pieces: Sequence[Shard], *, last: bool) -> None:
        """Starts saving a checkpoint of all workers' `pieces`. All workers must call it.

        The `last` one is waited for. Raises `StorageError` on the first worker if that cannot be written.
        """
        begin = time.perf_counter()
        self.settle()
        state = copy.deepcopy(state)  # training changes the original
        written: Future[_Written] = Future()
        if room_for_copies(pieces, self._collectives, MOST_OF_FREE_MEMORY * free_memory()):
            held = [piece.copied() for piece in pieces]
            written = self._thread.submit(self._write, held, state, begin, time.perf_counter() - begin, last)
        else:
            written.set_result(self._write(pieces, state, begin, None, last))
        self._pending = (state, written)
        if last and (failure := self.settle()) is not None:
            raise failure

    def close(self) -> None:
        """Waits for the checkpoint being written, so that a run that stops now does not lose it."""
        self._thread.shutdown(wait=True)

    def written(self) -> bool:
        """Whether a save is over and not yet settled."""
        return self._pending is not None and self._pending[1].done()

    def settle(self) -> StorageError | None:
        """Waits for the last save and registers its result; returns the error if it failed. All workers must call it."""
        if self._pending is None:
            return None
        state, writing = self._pending
        self._pending = None
        written = writing.result()
        self._register(written.checkpoint, state)
        return written.failure

    def _write(self, pieces: Sequence[Shard], state: State, begin: float, blocked_s: float | None, last: bool) -> _Written:
        tensors = self._gathering.whole(pieces)
        try:
            saved = (
                checkpoints.write_checkpoint(self._folder, tensors, state, self._facts, self._token)
                if self._collectives.rank == 0
                else None
            )
        except StorageError as error:
            return _Written(None, self._told(error, state, last))
        finally:
            for _ in tensors:  # gathering needs all workers, even after a failed write
                pass
        if saved is not None:
            checkpoints.prune(self._folder, self._keep, saved, self._round_steps)
            took = time.perf_counter() - begin
            self._tell(state, saved_s=took, blocked_s=took if blocked_s is None else blocked_s)
        return _Written(saved, None)

    def _told(self, failure: StorageError, state: State, last: bool) -> StorageError:
        try:
            before = checkpoints.find_newest(self._folder)
            good = f"the last whole checkpoint is that of step {before.state.step}" if before else "there is no other checkpoint"
        except StorageError:
            good = "which other checkpoints there are cannot be read either"
        if last:
            return StorageError(f"{failure}; {good}. Make room there and train again: it goes on from that.")
        self._tell(state, message=f"{failure}; {good}. Training goes on, and the next checkpoint is tried as usual.")
        return failure
