"""Losses on a GPU: those of the CPU, packed as unpacked, in little memory, with one call of the output layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from apprentice.recipe import DPO, GRPO
from apprentice.train.batch import PackedRows, PreferenceBatch, SupervisedBatch, target_places
from apprentice.train.losses import target_losses
from apprentice.train.losses.grpo import PolicyLoss
from apprentice.train.losses.preference import PreferenceLoss
from apprentice.train.losses.sft import Seq2SeqLoss, SupervisedLoss
from apprentice.train.losses.target_losses import TargetLosses
from tests.gpu.on_devices import (
    BOTH_DTYPES,
    check_same_direction,
    count_host_waits,
    gradients,
    llama,
    loaded,
    on_devices,
    only_batch,
    working_bytes,
)
from tests.models.architectures import CAUSAL, made
from tests.train import encoder_decoder_rows
from tests.train.rows import packed_rows, reply_rows

PACKING_MODELS = [*CAUSAL, "t5"]
NEAR = {torch.float32: 2e-4, torch.bfloat16: 0.05}  # nats; losses are about 6.2


def each_loss(model: Any, rows: PackedRows, device: torch.device) -> Tensor:
    """Losses of the targets of `rows`, in order."""
    batch, targets = only_batch(rows, device), TargetLosses(model)
    with torch.no_grad():
        if isinstance(batch, SupervisedBatch):
            return targets.causal(batch.input_ids, batch.positions, target_places(batch), "none")
        return targets.seq2seq(batch, "none")


def rows_for(name: str) -> PackedRows:
    return encoder_decoder_rows.paired_rows(2) if name == "t5" else packed_rows(2)


@on_devices()
@BOTH_DTYPES
@pytest.mark.parametrize("name", PACKING_MODELS)
def test_packed_examples_have_the_losses_of_single_ones(
    name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path
) -> None:
    rows, model = rows_for(name), loaded(made(name), tmp_path, dtype, device)
    single = torch.cat([each_loss(model, one, device) for one in encoder_decoder_rows.unpacked(rows)])
    torch.testing.assert_close(each_loss(model, rows, device), single, rtol=0, atol=NEAR[dtype])


@on_devices()
@BOTH_DTYPES
@pytest.mark.parametrize("name", PACKING_MODELS)
def test_an_example_does_not_see_its_neighbours(name: str, dtype: torch.dtype, device: torch.device, tmp_path: Path) -> None:
    """Other words in the first example of each row: its own losses change, those of the others do not."""
    rows, model = rows_for(name), loaded(made(name), tmp_path, dtype, device)
    before = each_loss(model, rows, device)
    first, answers = rows.segment_ids == 1, rows.segment_ids if rows.target_segment_ids is None else rows.target_segment_ids
    is_own = torch.from_numpy((answers == 1)[rows.loss_mask > 0]).to(device)
    rows.input_ids[first] = (rows.input_ids[first] + 200) % 500
    change = (each_loss(model, rows, device) - before).abs()
    assert change[is_own].max() > 0.01
    assert change[~is_own].max() < 1e-3


@on_devices()
@pytest.mark.parametrize("objective", ["sft", "weighted", "t5", "dpo", "grpo"])
def test_losses_and_gradients_are_those_of_the_cpu(objective: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", 8 * 500)  # several chunks
    values = [_loss_and_gradients(objective, where) for where in (device, torch.device("cpu"))]
    torch.testing.assert_close(values[0][0], values[1][0], rtol=1e-4, atol=1e-4)
    check_same_direction(values[0][1], values[1][1], 0.9999)


def _loss_and_gradients(objective: str, device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    model = made("t5" if objective == "t5" else "llama").to(device)
    loss: Any
    if objective == "t5":
        loss, batch = Seq2SeqLoss(model), only_batch(encoder_decoder_rows.paired_rows(2), device)
    elif objective == "dpo":
        loss, batch = PreferenceLoss(model, DPO()), _pairs(device)
    elif objective == "grpo":
        loss, batch = PolicyLoss(model, GRPO(reward="run:judge")), only_batch(reply_rows(2), device)
    else:
        loss, batch = SupervisedLoss(model), only_batch(packed_rows(2, weighted=objective == "weighted"), device)
    value = loss(batch)
    value.backward()
    return value.detach().cpu(), gradients(model)


def _pairs(device: torch.device) -> PreferenceBatch:
    """Two rows, each a pair of answers of 20 tokens, half of them targets."""
    rng, places = np.random.default_rng(5), torch.arange(40)
    ids = torch.from_numpy(rng.integers(3, 500, (2, 40))).to(device)
    answers = (places // 20 + torch.tensor([[0], [2]])).to(device)
    is_target = (places % 20 >= 10).expand(2, 40).to(device)
    return PreferenceBatch(ids, (places % 20).expand(2, 40).to(device), answers, torch.full((4,), -60.0, device=device), is_target)


@on_devices()
def test_bfloat16_losses_in_chunks_are_near_float32_without(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = only_batch(packed_rows(4), device)
    plain = llama(hidden=128).to(device)
    logits = plain(input_ids=batch.input_ids, position_ids=batch.positions, use_cache=False).logits[:, :-1]
    expected = F.cross_entropy(logits[batch.is_target[:, 1:]], batch.input_ids[:, 1:][batch.is_target[:, 1:]], reduction="sum")
    expected.backward()
    reference = gradients(plain)
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", 8 * 500)
    model = llama(hidden=128).to(device, torch.bfloat16)
    loss = SupervisedLoss(model)(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    check_same_direction(gradients(model), reference, 0.98)


@on_devices()
def test_all_logits_never_exist_at_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    length, vocabulary = (16_384, 65_536) if device.type == "cuda" else (512, 8_192)
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", length * vocabulary // 32)
    model = llama(hidden=64, vocabulary=vocabulary).to(device, torch.bfloat16)
    ids = torch.randint(3, vocabulary, (1, length), device=device)
    loss = SupervisedLoss(model)
    peak = working_bytes(lambda: loss(SupervisedBatch(ids, None, torch.ones_like(ids, dtype=torch.bool))).backward(), device)
    assert peak < 2 * length * vocabulary / 2  # half of what they take in bfloat16, without float32 copies and gradients


@on_devices()
@pytest.mark.parametrize("targets", [0, 1, 40])
def test_the_output_layer_is_called_once(targets: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", 4 * 500)
    model, calls = llama().to(device, torch.bfloat16), []
    model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1))
    batch = only_batch(packed_rows(2), device)
    is_target = torch.zeros_like(batch.is_target)
    is_target.view(-1)[1 : targets + 1] = True
    loss = SupervisedLoss(model)(batch._replace(is_target=is_target, places=None))
    loss.backward()
    assert len(calls) == 1
    assert bool(torch.isfinite(loss))
    assert (loss.item() == 0.0) == (targets == 0)


@on_devices()
@pytest.mark.parametrize("chunk", [2**26, 2 * 500])
def test_the_host_never_waits(device: torch.device, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", chunk)
    batch = only_batch(packed_rows(4), device)
    loss = SupervisedLoss(loaded(llama(layers=2), tmp_path, torch.bfloat16, device))
    loss(batch).backward()  # the first pass also asks what the model does to its logits
    assert count_host_waits(lambda: loss(batch).backward(), device) == 0
    assert count_host_waits(lambda: loss(batch._replace(places=None)).backward(), device) > 0
