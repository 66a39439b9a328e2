"""The loss of shared rows through every architecture, in a group of one worker: what a model is told arrives in its attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from apprentice.inference.compat import using_attention
from apprentice.models.attention.ulysses import ULYSSES, register_ulysses
from apprentice.train.batch import SupervisedBatch
from apprentice.train.engine.sequence_group import cut_batch
from apprentice.train.losses.sft import SupervisedLoss
from apprentice.train.losses.shared_rows import SharedRowsLoss
from tests.models.architectures import CAUSAL, made
from tests.train.rows import packed_rows


@pytest.fixture(scope="module")
def group() -> Iterator[Any]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", sorted(set(CAUSAL) - {"gemma2"}))  # whose soft cap is refused
def test_the_loss_and_gradients_are_those_of_whole_rows(group: Any, name: str, weighted: bool) -> None:
    model = made(name).train()
    batch = packed_rows(2, weighted=weighted).micro_batches(2)[0]
    assert isinstance(batch, SupervisedBatch)
    expected = SupervisedLoss(model)(batch)
    expected.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters() if parameter.grad is not None}
    model.zero_grad(set_to_none=True)
    register_ulysses()
    with using_attention(model.config, ULYSSES):
        loss = SharedRowsLoss(model, group)(cut_batch(batch, 0, 1))
        loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        if key in gradients:
            torch.testing.assert_close(parameter.grad, gradients[key], rtol=1e-3, atol=1e-4)
