"""No loss makes the host wait for a GPU: nothing is read, and nothing is chosen by a mask, in a pass forward and back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from apprentice.models.attention import varlen
from apprentice.models.attention.t5_segments import register_t5_segments
from apprentice.recipe import Training
from apprentice.train.batch import PackedRows
from apprentice.train.losses import target_losses
from apprentice.train.losses.loss_registry import create_loss
from tests.gpu.on_devices import CPU, count_host_waits
from tests.models.architectures import made
from tests.train import encoder_decoder_rows
from tests.train.preference_rows import pair_rows
from tests.train.rows import packed_rows, reply_rows


def without_reads(query: Tensor, key: Tensor, value: Tensor, *_: Any, enable_gqa: bool = False, **__: Any) -> Tensor:
    """In place of PyTorch's kernel, whose CUDA code reads bounds on the GPU."""
    return query + (key.sum() + value.sum())


def causal() -> Any:
    return made("llama", "varlen")


def rewards() -> Any:
    config = made("llama").config
    config.num_labels, config.pad_token_id = 1, 0
    model = AutoModelForSequenceClassification.from_config(config)
    model.set_attn_implementation("varlen")
    return model


OBJECTIVES = {
    "sft": (causal, packed_rows(2), {}),
    "weighted": (causal, packed_rows(2, weighted=True), {}),
    "seq2seq": (lambda: made("t5", "t5_segments"), encoder_decoder_rows.paired_rows(2), {}),
    "dpo": (causal, pair_rows(2), {"objective": "dpo"}),
    "reward": (rewards, pair_rows(2), {"objective": "reward"}),
    "grpo": (causal, reply_rows(2), {"objective": "grpo", "grpo": {"reward": "judge"}}),
}


@pytest.mark.parametrize("targets_at_once", [2**20, 4])
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_no_loss_waits(objective: str, targets_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    varlen.register_varlen()
    register_t5_segments()
    monkeypatch.setattr(varlen, "varlen_attn", without_reads)
    monkeypatch.setattr(target_losses, "CHUNK_NUMBERS", 500 * targets_at_once)
    make, rows, keys = OBJECTIVES[objective]
    loss = create_loss(make().train(), Training.model_validate({"steps": 1, **keys}))
    batch = micro_batch(rows)
    loss(batch).backward()  # the first pass also compares what the model does to its logits
    assert count_host_waits(lambda: loss(batch).backward(), CPU) == 0
    assert count_host_waits(lambda: loss(batch._replace(places=None)).backward(), CPU) > 0


def micro_batch(rows: PackedRows) -> Any:
    [batch] = rows.micro_batches(2)
    return batch


def test_the_tracer_sees_waits() -> None:
    numbers = torch.arange(3.0)
    for call in (numbers.sum().item, lambda: numbers[numbers > 1], lambda: numbers.nonzero(), lambda: bool(numbers[0] == 0)):
        assert count_host_waits(call, CPU) > 0
    assert count_host_waits(lambda: numbers[torch.tensor([1])], CPU) == 0
