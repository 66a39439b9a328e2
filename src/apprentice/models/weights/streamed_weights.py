"""Weights of a model that stay in files: a parameter has memory while the module that it belongs to runs, or while it is written.

    files ──source──▶ parameter, whole ──merges (LoRA)──▶ ──number format──▶ a forward pass, a file, a comparison

Between two uses a parameter is one number, NaN, repeated: a model that reads a parameter outside of its module shows that in its
results. Parameters of few numbers are always in memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from apprentice.models.weights.parameter_source import MemorySource, ParameterSource
from apprentice.models.weights.rounding import round_merged

LEAST_NUMBERS = 1 << 16  # parameters of fewer numbers are always in memory
_COMPARED_AT_ONCE = 1 << 22  # elements


class StreamedWeights:
    """Splitter for one process: it leaves each parameter in the files and reads it, whole, when it is used.

    `tell_memory`, if given, is called with each tensor that is read or made of one.
    """

    def __init__(self, least: int | None = None, tell_memory: Callable[[Tensor], None] = lambda _: None) -> None:
        self._least = LEAST_NUMBERS if least is None else least
        self._tell_memory = tell_memory
        self._sources: dict[nn.Parameter, ParameterSource] = {}
        self._formats: dict[nn.Parameter, torch.dtype] = {}  # that values are read and merged in
        self._merges: dict[nn.Parameter, list[Any]] = {}
        self._places: dict[nn.Parameter, int] = {}  # of merged parameters among each other: seeds of their rounding
        self._uses = Counter[nn.Parameter]()
        self.bytes_read = 0

    def are_equal(self, one: ParameterSource, other: ParameterSource, numel: int, dtype: torch.dtype) -> bool:
        """Whether two parameters of `numel` elements have the same values in `dtype`."""
        for start in range(0, numel, _COMPARED_AT_ONCE):
            values = [torch.empty(min(_COMPARED_AT_ONCE, numel - start), dtype=dtype) for _ in range(2)]
            one.fill(start, values[0])
            other.fill(start, values[1])
            if not torch.equal(*values):
                return False
        return True

    def split(self, parameter: nn.Parameter, source: ParameterSource) -> None:
        """Leaves the values of `parameter` in `source`, unless they are few, or in memory anyway."""
        if isinstance(source, MemorySource):
            return
        if parameter.numel() < self._least:
            values = torch.empty(parameter.numel(), dtype=parameter.dtype)
            source.fill(0, values)
            parameter.data = values.view(parameter.shape)
            return
        self._sources[parameter], self._formats[parameter] = source, parameter.dtype
        parameter.data = _without_values(parameter, parameter.dtype)

    def count_bytes(self, count: int) -> None:
        """Notes that `count` bytes of weights have been read."""
        self.bytes_read += count

    def is_streamed(self, parameter: nn.Parameter) -> bool:
        """Whether the values of `parameter` are in files."""
        return parameter in self._sources

    def replace_source(self, parameter: nn.Parameter, source: ParameterSource) -> None:
        """Takes the values of `parameter`, which is streamed, from another source."""
        self._sources[parameter] = source

    def merge_on_read(self, parameter: nn.Parameter, layer: Any) -> None:
        """Merges what peft's `layer` adds to `parameter`: each time that it is read, or now if it is in memory."""
        self._places.setdefault(parameter, len(self._places))
        if parameter in self._sources:
            self._merges.setdefault(parameter, []).append(layer)
        else:
            layer.merge()

    def cast(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Gives the floating-point parameters and stored buffers of `model` the number format `dtype`, after merging.

        Other buffers keep theirs, as where the model is loaded again: in 16 bits rotary frequencies turn far positions wrongly.
        """
        for parameter in model.parameters():
            if parameter.is_floating_point():
                is_streamed = parameter in self._sources
                parameter.data = _without_values(parameter, dtype) if is_streamed else self._round(parameter, parameter.data, dtype)
        for value in model.state_dict(keep_vars=True).values():
            if not isinstance(value, nn.Parameter) and value.is_floating_point():
                value.data = value.data.to(dtype)

    def read(self, parameter: nn.Parameter) -> Tensor:
        """The values of `parameter`, merged, in its number format; a parameter in memory is given itself."""
        if parameter not in self._sources:
            return parameter.data
        values = torch.empty(parameter.numel(), dtype=self._formats[parameter])
        self._tell_memory(values)
        self._sources[parameter].fill(0, values)
        values = values.view(parameter.shape)
        placeholder = parameter.data
        try:
            for layer in self._merges.get(parameter, ()):
                parameter.data = values
                layer.merge()
                layer.merged_adapters.clear()
                values = parameter.data
        finally:
            parameter.data = placeholder
        values = self._round(parameter, values, placeholder.dtype)
        self._tell_memory(values)
        return values

    def _round(self, parameter: nn.Parameter, values: Tensor, dtype: torch.dtype) -> Tensor:
        """`values` of `parameter` in `dtype`; where an adapter was merged into them, small changes are not rounded away."""
        return values.to(dtype) if parameter not in self._places else round_merged(values.float(), dtype, self._places[parameter])

    @contextmanager
    def gather_on_use(self, model: nn.Module) -> Iterator[None]:
        """Inside it, forward passes without gradients run through `model`, each module's own parameters in memory meanwhile."""
        handles: list[Any] = []
        for module in model.modules():
            inner: Any = module
            layer = inner.get_base_layer() if hasattr(module, "get_base_layer") else module  # whose weight DoRA's length is of
            if own := [parameter for parameter in layer.parameters(recurse=False) if parameter in self._sources]:
                handles += self._add_hooks(module, own)
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add_hooks(self, module: nn.Module, parameters: list[nn.Parameter]) -> list[Any]:
        def gather(*_: Any) -> None:
            for parameter in parameters:
                if not self._uses[parameter]:
                    parameter.data = self.read(parameter)
                self._uses[parameter] += 1

        def release(*_: Any) -> None:
            for parameter in parameters:
                self._uses[parameter] -= 1
                if not self._uses[parameter]:
                    parameter.data = _without_values(parameter, parameter.dtype)

        return [module.register_forward_pre_hook(gather), module.register_forward_hook(release, always_call=True)]


def _without_values(parameter: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """A tensor of the parameter's shape that is one NaN in memory."""
    return torch.full((), float("nan"), dtype=dtype).expand(parameter.shape)
