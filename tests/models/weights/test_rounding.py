"""Rounding of merged weights: right on average, to a neighbour, and exact where bfloat16 holds the value."""

import torch

from apprentice.models.weights.rounding import round_merged

STEP = 2.0**-8  # of bfloat16 between 0.5 and 1, halved below


def test_the_mean_of_many_rounded_values_is_the_value_and_each_is_a_neighbour() -> None:
    for value in (0.5007, -0.5007, 0.50038, 3.0001e-30):
        values = torch.full((1 << 18,), value)
        rounded = round_merged(values, torch.bfloat16, 0).float()
        neighbours = rounded.unique()
        assert neighbours.numel() == 2
        assert neighbours[0] < values[0] < neighbours[1]
        step = float(neighbours[1] - neighbours[0])
        assert abs(float(rounded.double().mean()) - float(values[0])) < 0.01 * step  # ten standard errors at most


def test_values_of_the_grid_and_values_that_are_not_finite_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    on_grid = torch.randn(4096, generator=generator).bfloat16()
    assert torch.equal(round_merged(on_grid.float(), torch.bfloat16, 1), on_grid)
    odd = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0, -0.0])
    rounded = round_merged(odd, torch.bfloat16, 1)
    assert torch.equal(rounded[[0, 1, 3, 4]], odd.bfloat16()[[0, 1, 3, 4]])
    assert rounded[2].isnan()


def test_a_seed_gives_the_same_bits_and_another_gives_others() -> None:
    values = torch.linspace(0.1, 0.2, 4096)
    first, again, other = (round_merged(values, torch.bfloat16, seed) for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_other_formats_are_rounded_to_the_nearest() -> None:
    values = torch.linspace(0.1, 0.2, 4096)
    assert torch.equal(round_merged(values, torch.float16, 0), values.half())
    assert torch.equal(round_merged(values, torch.float32, 0), values)
