"""Rounding of merged weights to bfloat16, up or down by chance, so that small changes of many weights are not lost together.

A base model's weights lie on bfloat16's grid already, whose steps are 1/256 to 1/128 of a weight. Tuning moves most weights by less
than half a step. Rounded to the nearest, each such weight falls back to where it was, and with it what was learned:

    base 0.5000   change +0.0007   grid …  0.5000  0.5039  …
    nearest       0.5000                          the change is lost, in every weight that is like it
    by chance     0.5039 with probability 0.18    on average 0.5007: the errors cancel in a product of hundreds of weights
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW_BITS = 16  # of a float32's fraction that bfloat16 leaves out


def round_merged(values: Tensor, dtype: torch.dtype, seed: int) -> Tensor:
    """`values`, float32 of any shape, in `dtype`: stochastically rounded to bfloat16, to the nearest in every other format.

    Values that bfloat16 holds exactly stay. The same `seed` gives the same bits on the same kind of device.
    Source: Gupta et al. 2015, Deep Learning with Limited Numerical Precision (arXiv 1502.02551), section 2.
    """
    if dtype != torch.bfloat16:
        return values.to(dtype)
    generator = torch.Generator(values.device).manual_seed(seed)
    bits = torch.randint(0, 1 << _LOW_BITS, values.shape, generator=generator, dtype=torch.int32, device=values.device)
    bits.add_(values.view(torch.int32)).bitwise_and_(
        -(1 << _LOW_BITS)
    )  # carries into the kept bits with the left-out part's probability
    rounded, is_finite = bits.view(torch.float32).to(dtype), values.isfinite()
    return rounded if bool(is_finite.all()) else torch.where(is_finite, rounded, values.to(dtype))
