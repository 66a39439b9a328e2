"""How many floating-point operations a token takes, and what devices are known."""

from __future__ import annotations

import pytest

from apprentice.train.metrics import mfu as flops


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA L40", 181e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", 165.2e12),
        ("Tesla V100-SXM2-16GB", 125e12),
        ("NVIDIA A10G", 70e12),
        ("NVIDIA A1000", None),
        ("somebody's card", None),
    ],
)
def test_peaks_by_the_name_that_the_device_gives(name: str, expected: float | None) -> None:
    assert flops.peak_flops(name) == expected


def test_a_trained_weight_costs_six_and_a_frozen_one_four() -> None:
    assert flops.flops_per_token(1000, 1000) == 6000.0
    assert flops.flops_per_token(1000, 0) == 4000.0
