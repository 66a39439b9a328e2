"""Private API of transformers that loading and saving by single tensors use, read in 5.23.

How `from_pretrained` names, converts and ties weights, and how `save_pretrained` names them and shares them out among files.
tests/models/weights/test_split_model.py and test_streamed_writer.py fail where it means something else: they compare every
architecture with `from_pretrained` and the files with those of `save_pretrained`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel, modeling_utils
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    SplitModulelist,
    WeightConverter,
    WeightRenaming,
    apply_converters,
    apply_renamings,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
    set_param_for_module,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils.generic import ContextManagers
from transformers.utils.loading_report import LoadStateDictInfo

_ROW_MOVES = (
    Chunk,
    Concatenate,
    MergeModulelist,
    Split,
    SplitModulelist,
)  # operations that move whole rows, or fail on their numbers


@dataclass
class Conversion:
    """A step of reading a checkpoint: its tensors `names` become parameter `target`, or several, `target` among them.

    `patterns` are those of transformers that the names matched; without a `converter` the only tensor is taken as it is.
    """

    target: str
    converter: WeightConverter | None
    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def moves_rows(self) -> bool:
        """Whether the operations only move rows, so that they do the same to numbers of rows."""
        return self.converter is not None and all(type(operation) in _ROW_MOVES for operation in self.converter.operations)

    def convert(self, tensors: Sequence[Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The parameters made of `tensors`, in the order of `names`."""
        if self.converter is None:
            return {self.target: tensors[0]}
        step = deepcopy(self.converter)
        for name, pattern, tensor in zip(self.names, self.patterns, tensors, strict=True):
            step.add_tensor(self.target, name, pattern, cast(Any, tensor))
        results = step.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in results.items()}


def build_on_meta(model_class: Any, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model of `config` on the meta device, its tied weights still apart, as `from_pretrained` makes it."""
    with ContextManagers(model_class.get_init_context(dtype, False, False, False)):
        model: PreTrainedModel = model_class(deepcopy(config))
    return model


def read_generation_config(model: PreTrainedModel, folder: Path) -> None:
    """Gives `model` the generation config that lies in `folder`, or that its config.json holds, as `from_pretrained` does."""
    if model.can_generate():
        place = (str(folder), None, False, None, True, None, "main", "", False)
        cast(Any, model).adjust_generation_fn(None, True, None, *place)


def buffer_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of each buffer of `model`, from `build_on_meta` in `dtype`, once loaded: a class may keep some in float32."""
    kept: dict[str, torch.dtype] = model._get_dtype_plan(dtype)
    pattern, names, _ = build_glob_alternation(list(kept))
    dtypes = {}
    for name, buffer in model.named_buffers():
        match = pattern.search(name) if kept else None
        dtypes[name] = kept[names[str(match.lastgroup)]] if match is not None else buffer.dtype
    return dtypes


def find_conversions(model: PreTrainedModel, names: Iterable[str]) -> list[Conversion]:
    """The steps by which `from_pretrained` makes the parameters of `model` from checkpoint tensors `names`.

    Names that belong to no parameter are left out, as there. The model keeps the mappings that were used, by which it is saved.
    """
    state = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    steps: dict[str, Conversion] = {}
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state or (pattern is None and target in steps):
            continue
        step = steps.setdefault(target, Conversion(target, by_pattern[pattern] if pattern is not None else None))
        step.names.append(name)
        step.patterns.append(pattern or name)
    cast(Any, model)._weight_conversions = [entry for entry in mapping if entry.was_used()]
    return list(steps.values())


@dataclass
class Reversal:
    """A step of writing a checkpoint: the model's tensors `names` become tensors of files.

    `patterns` are those of transformers that the names matched; without a `converter` the only tensor is written as it is, under
    the name `first`. `renamings` are applied to the names that a converter gives.
    """

    first: str
    converter: WeightConverter | None
    renamings: list[WeightRenaming]
    names: list[str] = field(default_factory=list)
    patterns: list[str] = field(default_factory=list)

    def revert(self, tensors: Sequence[Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
        """The tensors of files made of `tensors`, in the order of `names`."""
        if self.converter is None:
            return {self.first: tensors[0]}
        step = deepcopy(self.converter)
        for name, pattern, tensor in zip(self.names, self.patterns, tensors, strict=True):
            step.add_tensor(self.first, name, pattern, cast(Any, tensor))
        results = step.convert(self.first, model=model, config=model.config)
        return {
            apply_renamings(name, self.renamings): value[0] if isinstance(value, list) else value for name, value in results.items()
        }


def find_reversals(model: PreTrainedModel, names: Iterable[str]) -> list[Reversal]:
    """The steps by which `save_pretrained` makes the tensors of its files from tensors `names` of the state of `model`."""
    reverse = [entry.reverse_transform() for entry in reversed(cast(Any, model)._weight_conversions)]
    renamings = [entry for entry in reverse if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in reverse if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    steps: dict[str, Reversal] = {}
    for name in sorted(names, key=dot_natural_key) if reverse else names:
        first, pattern = apply_converters(name, converters)
        if pattern is None:
            first = apply_renamings(name, renamings)
        step = steps.setdefault(first, Reversal(first, None if pattern is None else by_pattern[pattern], renamings))
        step.names.append(name)
        step.patterns.append(pattern or name)
    return list(steps.values())


@dataclass
class SavePlan:
    """What `save_pretrained` writes: `files` hold the tensors, on the meta device, that each `steps` makes some of."""

    files: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    steps: list[tuple[Reversal, list[str]]] = field(default_factory=list)


def plan_saving(model: PreTrainedModel, folder: Path) -> SavePlan:
    """Writes what `save_pretrained` writes of `model` to `folder`, but for the weights, and returns the plan of those.

    The model is one of `find_conversions`. Its parameters may be without memory.
    """
    plan = SavePlan()

    def revert(_: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
        made: dict[str, Tensor] = {}
        for step in find_reversals(model, state):
            tensors = step.revert([state[name] for name in step.names], model)
            plan.steps.append((step, list(tensors)))
            made |= tensors
        return made

    def keep(tensors: dict[str, Tensor], file: str, metadata: dict[str, str]) -> None:
        plan.files[Path(file).name] = tensors
        plan.metadata = metadata

    state = {name: value.to("meta") for name, value in model.state_dict().items()}
    with patch.object(modeling_utils, "revert_weight_conversion", revert), patch.object(modeling_utils, "safe_save_file", keep):
        model.save_pretrained(folder, state_dict=state)
    return plan


class UnfilledModel:
    """A model from `build_on_meta` into which tensors are put one by one, as `from_pretrained` does."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self._info = LoadStateDictInfo(set(model.state_dict()), set(), set(), [], {}, set())

    def put(self, name: str, tensor: Tensor) -> None:
        """Puts `tensor` in the place of parameter or buffer `name`. One of another shape is left out, and `finish` raises."""
        set_param_for_module(self.model, name, tensor, self._info, cast(Any, None))

    def tied_pairs(self) -> list[tuple[str, str]]:
        """Names of parameters that are to be tied, (target, source), both of which were put in."""
        missing = self._info.missing_keys
        pairs = self.model.all_tied_weights_keys.items()
        return [(target, source) for target, source in pairs if target not in missing and source not in missing]

    def keep_apart(self, target: str) -> None:
        """Leaves parameter `target` untied, whatever the config says."""
        self.model.all_tied_weights_keys.pop(target)

    def finish(self) -> set[str]:
        """Ties weights, initialises what was not put in and buffers that no checkpoint holds; returns the names not put in.

        Raises `RuntimeError` for a tensor of another shape than the parameter's.
        """
        config = LoadStateDictConfig(device_map={"": "cpu"})
        info = type(self.model)._finalize_model_loading(self.model, config, self._info)
        return set(info.missing_keys)
