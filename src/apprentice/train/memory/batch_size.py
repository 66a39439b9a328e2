"""`micro_batch: auto` on a GPU: the most packed rows at once that a pass has room for, found by trying.

A pass is tried before DeepSpeed takes its share, which is held aside meanwhile, so that no worker waits for another that ran out.
More rows at once change sums only in their last digits. Knows nothing of DeepSpeed or of how a step is made.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from apprentice.train.losses.sft import TargetLoss
from apprentice.train.memory.measure import ran_out


def largest_that_fits(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` for which `fits` is true, if it is for all smaller ones; 1 if it is for none."""
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    low, high = 0, len(sizes)  # sizes[:low + 1] fit, sizes[high:] do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def has_room(loss: TargetLoss, rows: int, length: int, reserved: float, device: torch.device) -> bool:
    """Whether forward and backward pass of `rows` full rows of `length` tokens run beside `reserved` bytes. Gradients are dropped.

    Each row has two examples, and every token is a target: no real row takes more.
    """
    try:
        aside = torch.empty(int(reserved), dtype=torch.uint8, device=device)
        ids = torch.zeros((rows, length), dtype=torch.long, device=device)
        positions = torch.arange(length, device=device).remainder(max(1, length // 2)).expand(rows, length).contiguous()
        loss(ids, positions, torch.ones_like(ids, dtype=torch.bool)).backward()
        del aside
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return False
    finally:
        loss.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
