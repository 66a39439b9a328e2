"""Writing of a model's safetensors files tensor by tensor: the bytes that `save_pretrained` writes, with one tensor in memory.

    plan (compat.py)   config.json, index; which tensors lie in which file, and what each is made of
    each file          header, then tensor after tensor: read, merged, cast, written, let go

The files go through the storage layer, so that those on an object store need no copy on a disk.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apprentice.models.weights.compat import Reversal, SavePlan, plan_saving
from apprentice.models.weights.streamed_weights import StreamedWeights
from apprentice.storage import Folder

WINDOW_BYTES = 1 << 26  # most bytes that wait for the store at a time
# Safetensors' names of number formats, in the order in which it lays tensors out: the last format first, and then by name.
_FORMATS = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.float32: "F32",
    torch.float64: "F64",
    torch.int64: "I64",
}


class Digest(Protocol):
    """A running hash, such as one of hashlib."""

    def update(self, data: Any, /) -> None:
        """Takes `data` in."""


def write_model(model: PreTrainedModel, weights: StreamedWeights, folder: Path, target: Folder, digest: Digest) -> None:
    """Writes `model`, whose weights are streamed, as `save_pretrained` does: the files of weights to `target`, others to `folder`.

    `digest` takes in all files of weights, in order of name. Raises `OSError` where one cannot be written.
    """
    plan = plan_saving(model, folder)
    tensors = _Tensors(model, weights, plan)
    for name in sorted(plan.files):
        order = sorted(plan.files[name], key=lambda key: (-list(_FORMATS).index(plan.files[name][key].dtype), key))
        header = _header({key: plan.files[name][key] for key in order}, plan.metadata)
        with (target / name).open_writer() as stream:
            stream.write(header)
            digest.update(header)
            waiting = len(header)
            for key in order:
                values = tensors.take(key)
                for piece in values.reshape(-1).view(torch.uint8).split(WINDOW_BYTES) if values.numel() else ():
                    data = piece.numpy().data
                    digest.update(data)
                    stream.write(data)
                    waiting += len(data)
                    if waiting >= WINDOW_BYTES:
                        stream.flush()  # waits for an object store, which else would be given copies faster than it takes them
                        waiting = 0
                del values


class _Tensors:
    """The tensors of the files. What a step makes besides the one that is asked for is kept until it is asked for."""

    def __init__(self, model: PreTrainedModel, weights: StreamedWeights, plan: SavePlan) -> None:
        self._model, self._weights = model, weights
        self._steps: dict[str, Reversal] = {name: step for step, names in plan.steps for name in names}
        self._state: dict[str, Tensor] = model.state_dict(keep_vars=True)
        self._made: dict[str, Tensor] = {}
        self._expected = {name: (value.shape, value.dtype) for tensors in plan.files.values() for name, value in tensors.items()}

    def take(self, name: str) -> Tensor:
        """The tensor `name` of a file; each may be asked for once."""
        if name not in self._made:
            step = self._steps[name]
            self._made |= step.revert([self._read(part) for part in step.names], self._model)
        values = self._made.pop(name).contiguous()
        assert (values.shape, values.dtype) == self._expected[name], name  # as the header says
        return values

    def _read(self, name: str) -> Tensor:
        tensor = self._state[name]
        return self._weights.read(tensor) if isinstance(tensor, nn.Parameter) else tensor


def _header(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Header of a safetensors file: its length as 8 bytes, then JSON, padded to a multiple of 8 bytes."""
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.dtype.itemsize
        entries[name] = {"dtype": _FORMATS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
