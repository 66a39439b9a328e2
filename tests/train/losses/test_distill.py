"""The distillation loss against the plain divergence over the whole vocabulary, packed against one by one, and its chunks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from apprentice.recipe import Training
from apprentice.train.batch import PackedRows, SupervisedBatch
from apprentice.train.losses import target_losses
from apprentice.train.losses.distill import DistillationLoss, likeliest_tokens, target_logits
from apprentice.train.losses.loss_registry import create_loss
from tests.models.architectures import made
from tests.train.losses.test_preference import gradients, same
from tests.train.rows import examples_of, packed_rows

ROWS, VOCABULARY = 3, 500


def teacher_of(model: Any) -> Any:
    """Another model of the same kind."""
    teacher = made("llama")
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return teacher


def read_rows(teacher: Any, top: int, temperature: float) -> PackedRows:
    """Packed rows with what the teacher makes of them, as a run's folder keeps it."""
    rows = packed_rows(ROWS)
    targets = DistillationLoss(teacher, Training(steps=1).distill).targets
    parts: list[Any] = []
    with torch.no_grad():
        for batch in rows.micro_batches(1):
            assert isinstance(batch, SupervisedBatch)
            parts.append(likeliest_tokens(target_logits(targets, batch), top, temperature))
    ids, values = ([part[side].numpy().ravel() for part in parts] for side in (0, 1))
    return replace(rows, teacher_ids=ids, teacher_log_probs=values)


def created(model: Any, top: int, temperature: float) -> Any:
    distill = {"teacher": "run:teacher", "top": top, "temperature": temperature}
    return create_loss(model, Training.model_validate({"objective": "distill", "distill": distill, "steps": 1}))


def plain(model: Any, teacher: Any, rows: PackedRows, top: int, temperature: float) -> Tensor:
    """The divergence by the definition, each example in a pass of its own; the tokens outside of the top lumped together."""
    total = torch.zeros(())
    for ids, mask in examples_of(rows):
        own, other = (
            (one(input_ids=ids[None], use_cache=False).logits[0, :-1][mask[1:]] / temperature).softmax(-1)
            for one in (model, teacher)
        )
        order = other.argsort(dim=-1, descending=True)
        for side in range(len(own)):
            best, rest = order[side, :top], order[side, top:]
            p, q = other[side].detach(), own[side]
            total = total + temperature**2 * (p[best] * (p[best] / q[best]).log()).sum()
            if len(rest):
                total = total + temperature**2 * p[rest].sum() * (p[rest].sum() / q[rest].sum()).log()
    return total


@pytest.mark.parametrize(("top", "temperature"), [(VOCABULARY, 1.0), (VOCABULARY, 2.0), (8, 1.0), (8, 2.0), (1, 1.0)])
@pytest.mark.parametrize("chunk", [None, 3])
def test_packed_rows_have_the_plain_divergence(
    top: int, temperature: float, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    if chunk is not None:
        monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", chunk * VOCABULARY)
    model = made("llama")
    teacher = teacher_of(model)
    rows = read_rows(teacher, top, temperature)
    module = created(model, top, temperature)
    loss = module(rows.micro_batches(ROWS)[0])
    loss.backward()
    ours = gradients(model)
    expected = plain(model, teacher, rows, top, temperature)
    expected.backward()
    assert float(loss.detach()) > 0
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)
    same(ours, gradients(model))
    parts = torch.stack([module(batch) for batch in rows.micro_batches(1)]).sum()
    torch.testing.assert_close(loss, parts, rtol=1e-6, atol=0)


def test_the_whole_vocabulary_is_torchs_divergence() -> None:
    model = made("llama")
    teacher = teacher_of(model)
    rows = read_rows(teacher, VOCABULARY + 9, 1.0)
    batch = rows.micro_batches(ROWS)[0]
    assert isinstance(batch, SupervisedBatch)
    module = created(model, VOCABULARY, 1.0)
    with torch.no_grad():
        own, other = (target_logits(DistillationLoss(one, Training(steps=1).distill).targets, batch) for one in (model, teacher))
        expected = torch.nn.functional.kl_div(own.log_softmax(-1), other.log_softmax(-1), reduction="sum", log_target=True)
        torch.testing.assert_close(module(batch), expected, rtol=1e-4, atol=0)
        assert float(created(teacher, VOCABULARY, 1.0)(batch)) == pytest.approx(0.0, abs=1e-3)


def test_a_row_without_targets_costs_nothing() -> None:
    model = made("llama")
    rows = read_rows(teacher_of(model), 4, 1.0)
    empty = replace(
        rows,
        loss_mask=np.zeros_like(rows.loss_mask),
        teacher_ids=[np.zeros(0, np.int32)] * ROWS,
        teacher_log_probs=[np.zeros(0, np.float32)] * ROWS,
    )
    loss = created(model, 4, 1.0)(empty.micro_batches(ROWS)[0])
    loss.backward()
    assert float(loss.detach()) == 0.0


def test_what_is_next_to_impossible_is_no_number_that_is_none() -> None:
    logits = torch.tensor([[0.0, -1e4, -2e4, float("-inf")]])
    tokens = likeliest_tokens(logits, 2, 1.0)
    assert tokens.ids.tolist() == [[0, 1]]
    assert tokens.log_probs.isfinite().all()
