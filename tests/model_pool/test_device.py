"""The device of a process with GPUs reserved, and without."""

from __future__ import annotations

import pytest
import torch

from apprentice.errors import ResourcesError
from apprentice.model_pool.device import reserved_device


def test_gpus_that_pytorch_does_not_see_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reserved_device(0.0) == "cpu"
    with pytest.raises(ResourcesError, match=r"this process 1 GPUs and PyTorch .* sees none; install PyTorch's CUDA build"):
        reserved_device(1.0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert reserved_device(0.5) == "cuda"
    assert reserved_device(0.0) == "cpu"
