"""Draws are pure functions of logits, seed and step, and have the right distribution."""

from __future__ import annotations

import pytest
import torch

from apprentice.inference.generation_request import Sampling
from apprentice.inference.sampler import draw, uniform

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))


def test_uniform_is_counter_based() -> None:
    assert [round(uniform(17, step), 6) for step in range(3)] == [0.313826, 0.303029, 0.927818]
    assert len({uniform(seed, step) for seed in (-1, 0, 1, 2**64 + 5) for step in range(50)}) == 200
    assert uniform(2**64 + 5, 3) == uniform(5, 3)


def test_temperature_zero_takes_the_most_probable() -> None:
    assert draw(LOGITS[None], [Sampling()], [0]) == [1]
    assert draw(LOGITS[None], [Sampling(temperature=0.7, top_p=0.1, seed=5)], [3]) == [1]


@pytest.mark.parametrize(
    ("sampling", "shares"),
    [
        (Sampling(1.0), [0.1, 0.5, 0.15, 0.25]),
        (Sampling(1.0, top_p=0.7), [0.0, 2 / 3, 0.0, 1 / 3]),  # 0.5 is less than 0.7, 0.5 + 0.25 is not
        (Sampling(0.5), [0.01 / 0.345, 0.25 / 0.345, 0.0225 / 0.345, 0.0625 / 0.345]),
    ],
)
def test_shares(sampling: Sampling, shares: list[float]) -> None:
    count = 3000
    rates = torch.bincount(torch.tensor(draw(LOGITS.expand(count, -1), [sampling] * count, range(count))), minlength=4) / count
    assert rates.tolist() == pytest.approx(shares, abs=0.03)
