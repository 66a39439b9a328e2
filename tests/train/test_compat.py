"""The private API of PyTorch, transformers and tensorboardX that training uses still does what it did."""

from __future__ import annotations

from pathlib import Path

import torch
from tensorboardX.event_file_writer import EventsWriter
from torch import nn
from transformers import masking_utils

from apprentice.train import compat
from apprentice.train.engine.activation_checkpointing import enable_activation_checkpointing
from tests.models.architectures import made


def test_attention_name() -> None:
    assert compat.attention_name(made("llama")) in {"sdpa", "eager"}
    assert compat.attention_name(nn.Linear(1, 1)) == "eager"


def test_a_layer_calls_the_checkpoint_function() -> None:
    model = made("llama").train()
    enable_activation_checkpointing(model, True)
    calls: list[int] = []
    layers = [layer for layer in model.modules() if getattr(layer, "gradient_checkpointing", False) and hasattr(layer, "self_attn")]
    for layer in layers:
        compat.set_checkpoint_function(layer, lambda forward, *inputs: calls.append(len(inputs)) or forward(*inputs))
    model(input_ids=torch.tensor([[1, 2, 3]]))
    assert calls == [1] * len(layers) != []


def test_views_share_a_storage_id_on_the_meta_device() -> None:
    tensor, other = torch.empty(4, device="meta"), torch.empty(4, device="meta")
    assert compat.storage_id(tensor) == compat.storage_id(tensor[1:]) != compat.storage_id(other)


def test_positions_are_not_read() -> None:
    positions = torch.tensor([[0, 1, 0, 1]])
    assert masking_utils.find_packed_sequence_indices(positions) is not None
    with compat.unread_positions():
        assert masking_utils.find_packed_sequence_indices(positions) is None


def test_an_event_file_is_closed_without_a_flush(tmp_path: Path) -> None:
    writer = EventsWriter(str(tmp_path / "events"))
    compat.close_without_flush(writer)
    assert writer._py_recordio_writer._writer.closed
