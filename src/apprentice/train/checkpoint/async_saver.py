"""Checkpoints as a run makes them: each worker copies what it holds, and while training goes on the first gathers and writes it.

What cannot be written is told, and tried again at the next; only the last one must be there. All workers take part in gathering
the tensors, whether or not the first can write them. Knows nothing of Ray or DeepSpeed.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

from apprentice.errors import StorageError
from apprentice.run.fence import Token
from apprentice.storage import Folder
from apprentice.train.checkpoint import format as checkpoints
from apprentice.train.checkpoint.format import Checkpoint
from apprentice.train.checkpoint.shard_gather import Gathering, Piece, room_for_copies
from apprentice.train.engine.collectives import Peers
from apprentice.train.memory.measure import free_memory
from apprentice.train.state import State

MOST_OF_FREE_MEMORY = 0.5  # that a copy may take; what is larger is written while training waits


class _Written(NamedTuple):
    """One of the two."""

    checkpoint: Checkpoint | None
    failure: StorageError | None


class Saver:
    """Saves into `folder` on the first of `peers` and keeps `keep` there; `facts` go into every checkpoint. All must make one.

    On-policy, with rounds of `round_steps`, that with which the round began is kept besides.

    `tell(state, message=…)` gets a sentence about a checkpoint that could not be written, and `tell(state, saved_s=…, blocked_s=…)`
    how long one took and how long training waited for it, both from the thread that writes. `register` gets every outcome, on all
    workers alike, when they call `settle` or save the next: the checkpoint on the first worker, None on the others or if there is
    none. `token` is the first worker's right to commit; once that is gone, `FencedError` ends the run there.
    """

    def __init__(
        self,
        folder: Folder,
        keep: int,
        facts: dict[str, Any],
        *,
        peers: Peers,
        tell: Callable[..., None],
        register: Callable[[Checkpoint | None, State], None],
        round_steps: int | None = None,
        token: Token | None = None,
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._round_steps = round_steps
        self._facts = facts
        self._tell = tell
        self._token = token
        self._register = register
        self._peers = peers
        self._gathering = Gathering(peers)
        self._thread = ThreadPoolExecutor(1, "apprentice-checkpoint")
        self._pending: tuple[State, Future[_Written]] | None = None  # the state, and what becomes of it

    def save(self, state: State, pieces: Sequence[Piece], *, last: bool) -> None:
        """One checkpoint of all workers' `pieces`. Raises `StorageError` if it is the `last` and cannot be written."""
        begin = time.perf_counter()
        self.settle()
        state = copy.deepcopy(state)  # training goes on with it
        written: Future[_Written] = Future()
        if room_for_copies(pieces, self._peers, MOST_OF_FREE_MEMORY * free_memory()):
            held = [piece.copied() for piece in pieces]
            written = self._thread.submit(self._write, held, state, begin, time.perf_counter() - begin, last)
        else:
            written.set_result(self._write(pieces, state, begin, None, last))
        self._pending = (state, written)
        if last and (failure := self.settle()) is not None:
            raise failure

    def close(self) -> None:
        """Waits for the checkpoint that is being written, so that a run that stops here does not lose it."""
        self._thread.shutdown(wait=True)

    def written(self) -> bool:
        """Whether a save is over of which nobody has heard yet."""
        return self._pending is not None and self._pending[1].done()

    def settle(self) -> StorageError | None:
        """Waits for the save before and registers what became of it; gives what kept it from being written. All must call it."""
        if self._pending is None:
            return None
        state, writing = self._pending
        self._pending = None
        written = writing.result()
        self._register(written.checkpoint, state)
        return written.failure

    def _write(self, pieces: Sequence[Piece], state: State, begin: float, blocked_s: float | None, last: bool) -> _Written:
        tensors = self._gathering.whole(pieces)
        try:
            saved = checkpoints.save(self._folder, tensors, state, self._facts, self._token) if self._peers.rank == 0 else None
        except StorageError as error:
            return _Written(None, self._told(error, state, last))
        finally:
            for _ in tensors:  # gathering takes all workers, also for what is not written
                pass
        if saved is not None:
            checkpoints.prune(self._folder, self._keep, saved, self._round_steps)
            took = time.perf_counter() - begin
            self._tell(state, saved_s=took, blocked_s=took if blocked_s is None else blocked_s)
        return _Written(saved, None)

    def _told(self, failure: StorageError, state: State, last: bool) -> StorageError:
        try:
            before = checkpoints.restorable(self._folder)
            good = f"the last whole checkpoint is that of step {before.state.step}" if before else "there is no other checkpoint"
        except StorageError:
            good = "which other checkpoints there are cannot be read either"
        if last:
            return StorageError(f"{failure}; {good}. Make room there and train again: it goes on from that.")
        self._tell(state, message=f"{failure}; {good}. Training goes on, and the next checkpoint is tried as usual.")
        return failure
