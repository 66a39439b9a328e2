"""Private API of PyTorch 2.13, transformers 5.23 and tensorboardX 2.6. tests/train/test_compat.py fails when a release changes it.

That of DeepSpeed is in engine/compat.py, that of Ray in distributed/compat.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:  # torch takes two seconds to import, which metrics do not need
    from torch import Tensor, nn


def attention_name(model: nn.Module) -> str:
    """The attention implementation of a transformers model (`sdpa`, `flash_attention_2` …); `eager` for any other module."""
    return str(getattr(getattr(model, "config", None), "_attn_implementation", "eager"))


def set_checkpoint_function(layer: nn.Module, function: Callable[..., Any]) -> None:
    """Makes `layer`, whose activations are checkpointed, call `function(forward, *inputs)` in place of PyTorch's `checkpoint`."""
    inner: Any = layer
    inner._gradient_checkpointing_func = function


def storage_id(tensor: Tensor) -> int:
    """Number of the storage under `tensor`: views have the same. `data_ptr` is 0 for all tensors on the meta device."""
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def unread_positions() -> Iterator[None]:
    """Inside it transformers does not read the values of positions to find packed sequences: on the meta device there are none."""
    from transformers import masking_utils

    with patch.object(masking_utils, "find_packed_sequence_indices", lambda positions: None):
        yield


def close_without_flush(writer: Any) -> None:
    """Closes the file of tensorboardX's `EventsWriter`, whose own `close` raises where there is no room for what is buffered."""
    with suppress(OSError):
        writer._py_recordio_writer.close()
