"""Packed examples do not see each other, and the loss at target places only is the whole loss."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from apprentice.errors import RecipeError
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Training, Tuning
from apprentice.train.losses import target_losses as losses
from apprentice.train.losses.loss_registry import create_loss
from apprentice.train.losses.objective_loss import ObjectiveLoss
from apprentice.train.losses.sft import Seq2SeqLoss, SupervisedLoss
from tests.models.architectures import CAUSAL, SEQ2SEQ, made
from tests.train import encoder_decoder_rows
from tests.train.rows import counted, examples_of, packed_rows, reference_nll

CASES = [(name, attention) for name in CAUSAL for attention in ("sdpa", "eager") if (name, attention) != ("gemma2", "sdpa")]
PACKED_PAIRS = [(name, attention) for name in SEQ2SEQ if name != "bart" for attention in ("sdpa", "eager")]


def sft_loss(model: Any) -> ObjectiveLoss:
    return create_loss(model, Training(steps=1))


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_packed_logits_are_unpacked_logits(name: str, attention: str) -> None:
    model = made(name, attention)
    rows = packed_rows(2)
    micro = rows.micro_batches(2)[0]
    with torch.no_grad():
        packed = model(input_ids=micro.input_ids, position_ids=micro.positions, use_cache=False).logits
        alone = [model(input_ids=ids[None], use_cache=False).logits[0] for ids, _ in examples_of(rows)]
    segments = [
        packed[row][torch.tensor(rows.segment_ids[row, : packed.shape[1]] == segment)]
        for row in range(2)
        for segment in range(1, int(rows.segment_ids[row].max()) + 1)
    ]
    assert len(segments) == len(alone) >= 4
    for together, by_itself in zip(segments, alone, strict=True):
        torch.testing.assert_close(together, by_itself, rtol=0, atol=2e-5)


@pytest.mark.parametrize(("name", "attention"), CASES)
def test_loss_and_gradients_are_those_of_single_examples(name: str, attention: str) -> None:
    model = made(name, attention)
    rows = packed_rows(2)
    micro = rows.micro_batches(2)[0]
    loss = SupervisedLoss(model)(micro)
    loss.backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    reference = reference_nll(model, rows)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    compare_gradients(model, ours)


@pytest.mark.parametrize("chunk", [2**26, 512])
def test_a_target_counts_what_its_example_weighs(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", chunk)
    model, rows = made("llama", "sdpa"), packed_rows(2, weighted=True)
    micro = rows.micro_batches(2)[0]
    loss = SupervisedLoss(model)(micro)
    loss.backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    reference = reference_nll(model, rows)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    compare_gradients(model, ours)
    assert rows.loss_denominator == pytest.approx(counted(rows))
    assert rows.loss_denominator < rows.targets
    assert loss < SupervisedLoss(model)(micro._replace(is_target=micro.is_target > 0))


def test_a_pair_counts_what_its_example_weighs() -> None:
    rows = encoder_decoder_rows.paired_rows(2)
    each = [np.linspace(1.0, 0.25, len(fact.examples), dtype=np.float32) for fact in rows.facts]
    weighted = replace(rows, weights=each)
    loss = sft_loss(made("t5", "sdpa"))
    alone = torch.stack([loss(part.micro_batches(1)[0]) for part in encoder_decoder_rows.unpacked(rows)])
    torch.testing.assert_close(loss(weighted.micro_batches(2)[0]), (alone * torch.tensor(np.concatenate(each))).sum())
    assert weighted.loss_denominator == pytest.approx(
        sum(
            weight * count
            for fact, row in zip(rows.facts, each, strict=True)
            for weight, count in zip(row, fact.targets, strict=True)
        )
    )


def compare_gradients(model: Any, ours: dict[str, torch.Tensor]) -> None:
    assert ours
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-4, msg=key)


def test_bfloat16_loss_is_near() -> None:
    rows = packed_rows(2)
    micro = rows.micro_batches(2)[0]
    exact = SupervisedLoss(made("llama", "sdpa"))(micro)
    rough = SupervisedLoss(made("llama", "sdpa").to(torch.bfloat16))(micro)
    assert rough.dtype == torch.float32
    assert abs(rough.item() - exact.item()) / exact.item() < 1e-3


def test_a_model_without_an_output_layer_of_its_own() -> None:
    class Headless(nn.Module):
        """Gives all logits, whatever is asked."""

        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, **arguments: Any) -> Any:
            return self.inner(**arguments)

    model = made("llama", "sdpa")
    micro = packed_rows(2).micro_batches(2)[0]
    torch.testing.assert_close(SupervisedLoss(Headless(model))(micro), SupervisedLoss(model)(micro))


def test_no_target_gives_zero_and_no_trace_of_the_hook() -> None:
    model = made("llama", "sdpa")
    micro = packed_rows(1).micro_batches(1)[0]
    loss = SupervisedLoss(model)(micro._replace(is_target=torch.zeros_like(micro.is_target), places=None))
    loss.backward()
    assert loss.item() == 0.0
    assert not model.get_output_embeddings()._forward_pre_hooks


@pytest.mark.parametrize(("name", "attention"), PACKED_PAIRS)
def test_packed_pairs_are_single_pairs(name: str, attention: str) -> None:
    model, rows = made(name, attention), encoder_decoder_rows.paired_rows(2)
    loss = sft_loss(model)(rows.micro_batches(2)[0])
    loss.backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    reference = encoder_decoder_rows.reference_nll(model, rows)
    reference.backward()
    torch.testing.assert_close(loss, reference, rtol=1e-6, atol=0)
    compare_gradients(model, ours)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_one_pair_a_row(name: str) -> None:
    """Padded side by side in a batch, as BART must be trained."""
    model, rows = made(name), encoder_decoder_rows.paired_rows(3)
    alone = [part.micro_batches(1)[0] for part in encoder_decoder_rows.unpacked(rows)]
    total = torch.stack([sft_loss(model)(micro) for micro in alone]).sum()
    torch.testing.assert_close(total, encoder_decoder_rows.reference_nll(model, rows), rtol=1e-6, atol=0)
    assert len(alone) >= 6
    assert isinstance(sft_loss(model), Seq2SeqLoss)


@pytest.mark.parametrize("name", ["llama", "gemma2", "t5"])
def test_in_chunks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(name)
    rows = encoder_decoder_rows.paired_rows(2) if name in SEQ2SEQ else packed_rows(2)
    whole = sft_loss(model)(rows.micro_batches(2)[0])
    whole.backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}
    model.zero_grad()
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 3 * 500)
    rows_seen: list[int] = []
    head = model.get_output_embeddings()
    plain = head.forward
    monkeypatch.setattr(head, "forward", lambda states: rows_seen.append(states.shape[0]) or plain(states))
    chunked = sft_loss(model)(rows.micro_batches(2)[0])
    chunked.backward()
    torch.testing.assert_close(chunked, whole, rtol=1e-6, atol=0)
    compare_gradients(model, ours)
    assert max(rows_seen) == 3
    assert sum(rows_seen) == rows.targets  # no logits are computed twice


def test_a_model_that_does_more_to_its_logits_is_not_cut_into_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = made("llama")
    plain = model.forward

    def doubled(**arguments: Any) -> Any:
        output = plain(**arguments)
        output.logits = output.logits * 2
        return output

    model.forward = doubled
    micro = packed_rows(2).micro_batches(2)[0]
    whole = SupervisedLoss(model)(micro)
    monkeypatch.setattr(losses, "CHUNK_NUMBERS", 3 * 500)
    torch.testing.assert_close(SupervisedLoss(model)(micro), whole)


def test_flash_attention_gets_a_single_row() -> None:
    model, micro = made("llama"), packed_rows(2).micro_batches(2)[0]
    loss = SupervisedLoss(model)
    two_rows = loss(micro)
    loss.targets._is_flat = True
    torch.testing.assert_close(loss(micro), two_rows, rtol=1e-6, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("method", ["lora", "prefix", "prompt", "adapter"])
@pytest.mark.parametrize("name", ["llama", "t5", "bart"])
def test_every_method_learns_from_padded_rows_what_it_learns_from_single_ones(name: str, method: str) -> None:
    tuning = Tuning.model_validate({"method": method, "rank": 4, "virtual_tokens": 3, "width": 8})
    model = TUNING_METHODS[method].wrap(made(name), tuning, 1).eval()
    rows = encoder_decoder_rows.unpacked(encoder_decoder_rows.paired_rows(2) if name in SEQ2SEQ else packed_rows(2))
    loss = sft_loss(model)
    alone = torch.stack([loss(part.micro_batches(1)[0]) for part in rows]).sum()
    padded = torch.stack([loss(micro) for micro in encoder_decoder_rows.joined(rows).micro_batches(3)]).sum()
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=0)
    padded.backward()
    assert all(parameter.grad is not None for parameter in trainable_parameters(model).values())
    assert any(parameter.grad.abs().max() > 0 for parameter in trainable_parameters(model).values())
    if method in ("prefix", "prompt"):
        packed = encoder_decoder_rows.paired_rows(2) if name in SEQ2SEQ else packed_rows(2)
        with pytest.raises(RecipeError, match="must be `none` with tuning"):
            loss(packed.micro_batches(2)[0])
