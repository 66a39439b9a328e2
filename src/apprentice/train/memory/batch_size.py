"""Micro-batch size for `micro_batch: auto` on a GPU: the most packed rows for which there is memory, found by trial passes.

Passes are tried before DeepSpeed starts, with the memory that it will need reserved, so that no worker waits in a collective for
one that ran out. Another micro-batch size changes sums only in their last digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.memory.measure import is_out_of_memory


def find_largest_fitting(rows: int, fits: Callable[[int], bool]) -> int:
    """The largest divisor of `rows` for which `fits` is true, by bisection; 1 (not tried) if it is true for no larger one.

    `fits` must be true for all divisors below one for which it is true.
    """
    sizes = [size for size in range(1, rows + 1) if rows % size == 0]
    low, high = 0, len(sizes)  # sizes[:low + 1] fit (1 is taken for granted), sizes[high:] do not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low]


def fits_into_memory(loss: ObjectiveLoss, rows: int, length: int, reserved: float, device: torch.device) -> bool:
    """Whether a forward and backward pass of `rows` rows of `length` tokens fits beside `reserved` bytes. Drops the gradients.

    Each row is full, has two examples, and all its tokens are targets: no real row takes more.
    """
    try:
        reserved_memory = torch.empty(int(reserved), dtype=torch.uint8, device=device)
        ids = torch.zeros((rows, length), dtype=torch.long, device=device)
        positions = torch.arange(length, device=device).remainder(max(1, length // 2)).expand(rows, length).contiguous()
        loss(SupervisedBatch(ids, positions, torch.ones_like(ids, dtype=torch.bool))).backward()
        del reserved_memory
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    finally:
        loss.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return True
