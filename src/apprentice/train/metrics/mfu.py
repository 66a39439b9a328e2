"""Model FLOPs utilisation: how much of a device's peak the model's own arithmetic is (Chowdhery et al. 2022, appendix B).

Attention's products are left out, since packed examples are short and what they cost depends on how they lie in a row: the figure
never flatters. Knows nothing of engines.
"""

from __future__ import annotations

# Dense FLOP/s in bfloat16 (float16 where there is none), from the makers' data sheets; the first name found in the device's counts.
PEAKS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 70e12,
    "A10": 125e12,
    "V100": 125e12,
    "T4": 65e12,
}


def peak(device: str) -> float | None:
    """FLOP/s of the device with that name; None where it is not known."""
    return next((value for name, value in PEAKS.items() if name in device), None)


def per_token(numbers: int, trained: int) -> float:
    """FLOPs of a training step for each token of a model of `numbers` weights of which `trained` are trained.

    Two for each weight forward, two for the gradient of what it is multiplied with, and two for its own if it is trained.
    """
    return 4.0 * numbers + 2.0 * trained
