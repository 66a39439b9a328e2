"""A plain process of a test as a member of a process group over gloo, without Ray."""

from __future__ import annotations

import os
import warnings
from pathlib import Path


def join_group(folder: Path | str, rank: int = 0, workers: int = 1) -> None:
    """Joins the group whose members meet in `folder`, as DeepSpeed expects to find it; with one thread, and without warnings."""
    import torch
    import torch.distributed

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(workers), MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=workers)
