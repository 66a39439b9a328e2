"""The command `apprentice train RECIPE` whose workers stop before chosen steps until a file lets them go on: run as a script.

    python paused_training.py RECIPE FOLDER STEP…

Before step n of those named each worker writes `FOLDER/at-<n>-<rank>`, with its process and node, and waits for `FOLDER/go-<n>`.
While it waits, the first worker makes `FOLDER/heard-<n>` once it has heard that a checkpoint is requested after this step.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def pausing_worker(folder: str, steps: list[int]) -> Callable[[Any], None]:
    """The function that each worker runs. It goes to them by value, and with it all that it needs."""

    def work(job: Any) -> None:
        import json
        import os
        import time

        import ray
        import ray.train

        from apprentice.train import worker as training_worker
        from apprentice.train.distributed import ray_worker
        from apprentice.train.distributed.compat import preemption_notice

        inner = training_worker.run_worker

        def run_worker(config: Any, restored: Any, rows: Any, validation: Any, events: Any, **more: Any) -> Any:
            heartbeat = events._heartbeat
            rank = ray.train.get_context().get_world_rank()

            def has_heard() -> bool:
                """What `Heartbeat.is_checkpoint_requested` will say after this step; nothing is passed on by asking here."""
                notice = preemption_notice()
                return heartbeat._requests > heartbeat._granted_requests or notice not in (None, heartbeat._preemption)

            def paused_rows() -> Any:
                step = restored.state.step if restored else 0
                for batch in rows:
                    step += 1
                    if step in steps:
                        who = {"process": os.getpid(), "node": ray.get_runtime_context().get_node_id()}
                        (Path(folder) / f"at-{step}-{rank}").write_text(json.dumps(who))
                        while not (Path(folder) / f"go-{step}").exists():
                            if rank == 0 and has_heard():
                                (Path(folder) / f"heard-{step}").touch()
                            time.sleep(0.05)
                    yield batch

            return inner(config, restored, paused_rows(), validation, events, **more)

        training_worker.run_worker = run_worker
        ray_worker.work(job)

    return work


if __name__ == "__main__":
    from apprentice.cli import main
    from apprentice.train.distributed import driver as launch
    from apprentice.train.distributed import elastic as scaling

    scaling.LOOK_EVERY_S = 1.0
    launch.work = pausing_worker(sys.argv[2], [int(step) for step in sys.argv[3:]])
    sys.argv = ["apprentice", "train", sys.argv[1]]
    main()
