"""Micro-batch size for `micro_batch: auto` on a GPU: the most packed rows for which there is memory, found by trial passes.

Passes are tried before DeepSpeed starts, with the memory that it will need reserved, so that no worker waits in a collective for
one that ran out. A model that was split as it was loaded cannot be tried so: there an estimate of the memory decides. Another
micro-batch size changes sums only in their last digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from apprentice.recipe import Recipe
from apprentice.train.batch import SupervisedBatch
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.memory.measure import estimate_peak_memory, is_out_of_memory
from apprentice.train.memory.model_size import measure_model_size

USABLE_GPU_MEMORY = 0.9  # of a GPU's memory; the rest is CUDA's, and fragmentation


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


def fits_by_estimate(
    recipe: Recipe, parameters: int, dtype: torch.dtype, workers: int, length: int, memory: float
) -> Callable[[int], bool]:
    """A function of a number of rows of `length` tokens: whether a micro-batch of so many is estimated to fit a GPU with `memory`.

    The model has `parameters` parameters in `dtype`. Where the activations are not known no number fits.
    """
    trained = measure_model_size(recipe, dtype).trained

    def fits(rows: int) -> bool:
        estimate = estimate_peak_memory(recipe, parameters, trained, dtype, workers=workers, micro=rows, length=length)
        return estimate.activations is not None and estimate.total <= USABLE_GPU_MEMORY * memory

    return fits


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
