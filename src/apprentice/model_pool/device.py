"""The device of a process that Ray has given GPUs, or none."""

from __future__ import annotations

from typing import Literal

import torch

from apprentice.errors import ResourcesError


def reserved_device(gpus: float) -> Literal["cpu", "cuda"]:
    """The device of a process with `gpus` GPUs reserved.

    Raises `ResourcesError` where there are GPUs and PyTorch sees none, so that nothing meant for a GPU runs on CPUs unnoticed.
    """
    if not gpus:
        return "cpu"
    if not torch.cuda.is_available():
        raise ResourcesError(
            f"Ray gave this process {gpus:g} GPUs and PyTorch {torch.__version__} sees none; install PyTorch's CUDA build on each"
            " node and a driver that fits it, or set training.resources.gpus to 0."
        )
    return "cuda"
