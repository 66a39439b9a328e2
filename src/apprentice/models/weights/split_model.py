"""Loading of a model that is split among processes as it is built: none of them ever holds the whole of it.

    meta device ─▶ names and shapes ─▶ parameters without memory ─▶ ties, buffers, missing weights ─▶ each parameter split, and its
                                                                                                      share read from the files

The names in files and those of parameters, ties, buffers and initialisation are transformers' own (`compat.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apprentice.models.weights.compat import (
    Conversion,
    UnfilledModel,
    buffer_dtypes,
    build_on_meta,
    find_conversions,
    read_generation_config,
)
from apprentice.models.weights.parameter_source import (
    ConvertedSource,
    FileRun,
    FileSource,
    MemorySource,
    ParameterSource,
    row_numbers,
    runs_of_rows,
)
from apprentice.models.weights.safetensors_reader import SafetensorsReader, stored_weight_files, weight_files
from apprentice.models.weights.splitter import ModelSplitter
from apprentice.storage import Folder


def load_split_model(
    folder: Path,
    model_class: Any,
    config: Any,
    dtype: torch.dtype,
    splitter: ModelSplitter,
    weights: Folder | None = None,
) -> tuple[PreTrainedModel, set[str]]:
    """Loads the weights in `folder` into a `model_class` of `config` in `dtype`, split by `splitter`; the model is on the CPU.

    `weights` names another place of the files of weights, all of which belong to the model. Returns the model, in evaluation mode,
    and the names of the weights that the files lack and that were initialised. All processes must call it with the same state of
    the random number generator. Raises `ModelError` for files that cannot be read.
    """
    reader = SafetensorsReader(weight_files(folder) if weights is None else stored_weight_files(weights))
    unfilled = UnfilledModel(build_on_meta(model_class, config, dtype))
    parameters = dict(unfilled.model.named_parameters())
    buffers = buffer_dtypes(unfilled.model, dtype)
    sources: dict[str, ParameterSource] = {}
    by_parameter: dict[nn.Parameter, ParameterSource] = {}
    for name, shape, source in list(_find_sources(reader, unfilled.model)):
        if name in buffers:
            unfilled.put(name, _read_whole(source, shape, buffers[name]))
        elif name in parameters:
            parameter = _without_memory(shape, dtype)
            sources[name] = by_parameter[parameter] = source
            unfilled.put(name, parameter)
    for target, other in unfilled.tied_pairs():
        if not splitter.are_equal(sources[target], sources[other], parameters[target].numel(), dtype):
            unfilled.keep_apart(target)
    missing = unfilled.finish()
    read_generation_config(unfilled.model, folder)
    for parameter in unfilled.model.parameters():
        splitter.split(parameter, by_parameter.get(parameter) or MemorySource(parameter.data))
    splitter.count_bytes(reader.bytes_read)
    return unfilled.model.eval(), missing


class _FoundSource(NamedTuple):
    name: str
    shape: tuple[int, ...]
    source: ParameterSource


def _find_sources(reader: SafetensorsReader, model: PreTrainedModel) -> Iterator[_FoundSource]:
    """Where the values of each parameter and buffer of `model` are that a file has."""
    for step in find_conversions(model, reader.entries):
        shapes = [reader.entries[name].shape for name in step.names]
        if step.converter is None:
            yield _FoundSource(
                step.target, shapes[0], FileSource(reader, [FileRun(step.names[0], 0, reader.entries[step.names[0]].numel)])
            )
        else:
            yield from _find_converted(reader, model, step, shapes)


def _find_converted(
    reader: SafetensorsReader, model: PreTrainedModel, step: Conversion, shapes: list[tuple[int, ...]]
) -> Iterator[_FoundSource]:
    """Sources of the parameters that `step` makes of tensors with `shapes`."""
    width = shapes[0][-1]
    made = step.convert([torch.empty(shape, device="meta") for shape in shapes], model)
    numbers = row_numbers(shapes) if step.moves_rows() else None
    moved = {} if numbers is None else step.convert(numbers, model)
    for name, value in made.items():
        rows = moved.get(name)
        if rows is not None and (*rows.shape[:-1], rows.shape[-1] * width) == value.shape and rows.shape[-1] == 1:
            yield _FoundSource(name, tuple(value.shape), FileSource(reader, runs_of_rows(rows, step.names, shapes)))
        else:
            yield _FoundSource(name, tuple(value.shape), ConvertedSource(partial(_convert_whole, reader, model, step, name)))


def _convert_whole(reader: SafetensorsReader, model: PreTrainedModel, step: Conversion, name: str) -> Tensor:
    """Parameter `name` as `step` makes it of whole tensors."""
    return step.convert([reader.read(tensor) for tensor in step.names], model)[name]


def _without_memory(shape: tuple[int, ...], dtype: torch.dtype) -> nn.Parameter:
    """A parameter of `shape` on the CPU, all of whose elements are the same number in memory."""
    return nn.Parameter(torch.zeros((), dtype=dtype).expand(shape))


def _read_whole(source: ParameterSource, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    values = torch.empty(torch.Size(shape).numel(), dtype=dtype)
    source.fill(0, values)
    return values.view(shape)
