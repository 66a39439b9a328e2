"""Checkpoints as a run makes them: what cannot be written is told, and tried again at the next; only the last one must be there.

All workers take part in gathering the tensors, whether or not the first can write them. Knows nothing of Ray or DeepSpeed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from apprentice.errors import StorageError
from apprentice.storage import Folder
from apprentice.train import checkpoint as checkpoints
from apprentice.train.checkpoint import Checkpoint
from apprentice.train.state import State


class Saver:
    """Saves into `folder` on the first worker and keeps `keep` there; `facts` go into every checkpoint.

    `tell(state, message=…)` gets a sentence about a checkpoint that could not be written, `register` every outcome: the checkpoint
    on the first worker, None on the others or if there is none.
    """

    def __init__(
        self,
        folder: Folder,
        keep: int,
        facts: dict[str, Any],
        *,
        first: bool,
        tell: Callable[..., None],
        register: Callable[[Checkpoint | None, State], None],
    ) -> None:
        self._folder = folder
        self._keep = keep
        self._facts = facts
        self._first = first
        self._tell = tell
        self._register = register

    def save(self, state: State, tensors: Iterator[tuple[str, Tensor]], *, last: bool) -> None:
        """One checkpoint of `tensors`. Raises `StorageError` if it is the `last` of the run and cannot be written."""
        saved: Checkpoint | None = None
        failure: StorageError | None = None
        if self._first:
            try:
                saved = checkpoints.save(self._folder, tensors, state, self._facts)
            except StorageError as error:
                failure = error
        for _ in tensors:  # gathering takes all workers, also for what is not written
            pass
        if failure is not None:
            self._report(failure, state, last)
        self._register(saved, state)
        if saved is not None:
            checkpoints.prune(self._folder, self._keep)

    def _report(self, failure: StorageError, state: State, last: bool) -> None:
        before = checkpoints.restorable(self._folder)
        good = f"the last whole checkpoint is that of step {before.state.step}" if before else "there is no other checkpoint"
        if last:
            raise StorageError(f"{failure}; {good}. Make room there and train again: it goes on from that.") from failure
        self._tell(state, message=f"{failure}; {good}. Training goes on, and the next checkpoint is tried as usual.")
