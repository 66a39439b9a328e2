"""Model FLOPs utilisation (MFU): the model's FLOPs as a share of the device's peak (Chowdhery et al. 2022, appendix B).

The products inside attention are left out: packed examples are short, and their cost depends on how they lie in a row. So the
figure is a lower bound.
"""

from __future__ import annotations

import re

# Dense FLOP/s in bfloat16 (float16 where there is none), sums in float32, from the makers' data sheets. A device is known by the
# first key that stands in its name as words of their own: "NVIDIA L40" is no L4.
PEAKS = {
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
    "RTX 4090": 165.2e12,
}


def peak_flops(device: str) -> float | None:
    """Peak FLOP/s of the device with this name; None where it is not known."""
    return next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", device)), None)


def flops_per_token(numbers: float, trained: float) -> float:
    """Training FLOPs for one token, in a model of `numbers` weights of which `trained` are trained.

    For each weight: two in the forward pass, two for the gradient of the activation, and two for its own gradient if it is trained.
    """
    return 4.0 * numbers + 2.0 * trained
