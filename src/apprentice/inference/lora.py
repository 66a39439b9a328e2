"""Multi-LoRA: one forward pass over a shared base model in which each sequence has its own adapter, or none.

However many adapters there are, a layer costs two thin matrix products more for all rows. The `down` matrices of all adapters in
the pass are stacked, columns of other adapters than the row's own are set to zero in between, and the `up` matrices are stacked
too:

    rows       x with adapter a (rank 2), y with b (rank 1), z with none
    down       x: [a1 a2 b1]   y: [a1 a2 b1]   z: [a1 a2 b1]
    masked     x: [a1 a2  0]   y: [ 0  0 b1]   z: [ 0  0  0]
    up         adds to x what a adds, to y what b adds, and zeros to z

The base's weights are read once a pass, and never changed. In 16 bits what an adapter adds goes into the base's product before that
is rounded (`models/tuning/lora_forward.py`), as in training; in float32 it is added behind.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from apprentice.errors import ModelError
from apprentice.inference.compat import multiply_packed, pack_linear_weight
from apprentice.inference.cpu_linear import PackedLinear
from apprentice.models.tuning.lora_forward import AddingLinear
from apprentice.pretrained.trust import check_adapter_folder
from apprentice.run.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS

_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
# Initialisations of LoRA that change the base's own weights, so that the saved matrices do not fit the original base.
_CHANGING = ("pissa", "olora", "corda", "loftq")
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Lora:
    """LoRA adapter in memory: layer name → `down` (rank, inputs) and `up` (rank, outputs), which includes the scale.

    `number` is unique within this process and greater than 0.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    number: int = field(default_factory=lambda: next(_numbers))


def read_lora(folder: Path, model: Any) -> Lora:
    """Reads the adapter in `folder`, in PEFT's format, to the device and dtype of `model`'s layers.

    Raises `ModelError` if it cannot be read, is no plain LoRA, does not fit this model, or is not finite.
    """
    check_adapter_folder(folder)
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} cannot be read ({error.__class__.__name__}); save it again.") from error
    _check_kind(folder, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (match := _MATRIX.fullmatch(name.removeprefix(_PREFIX))) is None:
            raise ModelError(f"the adapter in {folder} has {name!r} besides LoRA's two matrices; merge it and serve the result.")
        pairs.setdefault(match[1], {})[match[2]] = tensor
    modules = dict(model.named_modules())
    head = model.get_output_embeddings()
    layers = {}
    for name, pair in pairs.items():
        module = modules.get(name)
        shapes = [tuple(pair[key].shape) if key in pair else () for key in "AB"]
        if module is None or module is head or not _fits(module, *shapes):
            raise ModelError(f"the adapter in {folder} does not fit this base: {name!r} is another layer there, or none.")
        if not all(bool(tensor.isfinite().all()) for tensor in pair.values()):
            raise ModelError(f"the adapter in {folder} holds numbers that are not finite, in {name!r}; train it again.")
        up = pair["B"].float().T * _scale(config, name, shapes[0][0])
        weight = module.weight
        # A copy, because tensors from safetensors may be mapped from the file, which may be replaced.
        down = pair["A"].to(weight.device, weight.dtype, copy=True)
        layers[name] = (down, up.to(weight.device, weight.dtype).contiguous())
    return Lora(layers)


def _check_kind(folder: Path, config: Mapping[str, Any]) -> None:
    kind = str(config.get("peft_type"))
    if kind != "LORA":
        raise ModelError(f"the adapter in {folder} is {kind}, and only LoRA shares a base with others; serve its run alone.")
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGING) or config.get("alora_invocation_tokens"):
        raise ModelError(f"the adapter in {folder} changes more than it adds ({start}); merge it and serve the result.")


def _fits(module: Any, down: Sequence[int], up: Sequence[int]) -> bool:
    """True if matrices of these shapes fit `module`, a linear layer; GPT-2's linear layers have a transposed weight."""
    shape: Sequence[int] = getattr(getattr(module, "weight", None), "shape", ())
    if len(shape) != 2 or len(down) != 2 or len(up) != 2 or isinstance(module, torch.nn.Embedding):
        return False
    outputs, inputs = shape if isinstance(module, torch.nn.Linear) else (shape[1], shape[0])
    return (down[1], up[0], down[0]) == (inputs, outputs, up[1])


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """PEFT's factor of the product of the two matrices: alpha / rank, or alpha / √rank with rslora."""
    alpha = float(config.get("lora_alpha") or rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = float(value)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


class LoraLayers:
    """Applies adapters to `model` by forward hooks; `rows` says which row has which adapter. One pass at a time.

    The layers named in `cross_layers` compute other rows than the rest: cross-attention's projections of the encoder's states.
    Layers with the same input tensor, such as those of queries, keys and values, share one product with all their `down` matrices;
    which layers these are is found in the first pass.
    """

    def __init__(self, model: Any, cross_layers: Collection[str] = ()) -> None:
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._cross_layers = frozenset(cross_layers)
        self._device = model.device
        self._hooked: set[str] = set()
        self._stacked: tuple[Lora, ...] = ()
        self._stacks: dict[str, _Stack] = {}
        self._same_input: dict[str, list[str]] = {}  # the first layer that gets an input tensor → all layers that get it
        # For layers that share a product: their stacked `down` matrices, the adapter of each column, the columns of each layer.
        self._joint: dict[tuple[str, ...], tuple[Tensor, tuple[int, ...], list[int]]] = {}
        self._rows: dict[bool, _Rows | None] = {}  # of the cross layers (True), and of all others (False)
        self._inputs: Tensor | None = None
        self._first_layer = ""
        self._products: dict[str, Tensor] = {}  # of the layers that share `_inputs`

    @contextmanager
    def rows(
        self,
        adapters: Sequence[Lora | None],
        counts: Sequence[int],
        cross: tuple[Sequence[Lora | None], Sequence[int]] = ((), ()),
    ) -> Iterator[None]:
        """Within it, the first `counts[0]` rows of a pass have `adapters[0]`, the next `counts[1]` have `adapters[1]`, and so on.

        If `adapters` has one entry, it applies to all rows, however many. `cross` has those of the cross layers.
        """
        used = {adapter for adapter in (*adapters, *cross[0]) if adapter is not None}
        if not used:
            yield
            return
        if not used <= set(self._stacked):
            self._stack(tuple(sorted(used, key=lambda adapter: adapter.number)))
        self._rows = {False: self._owners_of(adapters, counts), True: self._owners_of(*cross)}
        try:
            yield
        except BaseException:
            self._stacked = ()  # so that an adapter that cannot be applied is not used in the next pass
            raise
        finally:
            self._rows, self._products, self._inputs = {}, {}, None

    def _owners_of(self, adapters: Sequence[Lora | None], counts: Sequence[int]) -> _Rows | None:
        if all(adapter is None for adapter in adapters):
            return None
        places = {adapter: place for place, adapter in enumerate(self._stacked)}
        owners = np.array([-1 if adapter is None else places[adapter] for adapter in adapters])
        owners = np.repeat(owners, counts) if len(owners) > 1 else owners
        return _Rows(torch.from_numpy(owners).to(self._device))

    def _stack(self, adapters: tuple[Lora, ...]) -> None:
        self._stacked = adapters
        self._stacks, self._joint = {}, {}
        for name in sorted({name for adapter in adapters for name in adapter.layers}):
            own = [(place, adapter.layers[name]) for place, adapter in enumerate(adapters) if name in adapter.layers]
            columns = tuple(place for place, (down, _) in own for _ in range(len(down)))
            up, module = torch.cat([up for _, (_, up) in own]), self._modules[name]
            packed_up = pack_linear_weight(up.t().contiguous()) if isinstance(module, PackedLinear) else None
            self._stacks[name] = _Stack(torch.cat([down for _, (down, _) in own]), up, packed_up, columns)
            if name not in self._hooked:
                self._hooked.add(name)
                self._hook(name, module)

    def _hook(self, name: str, module: Any) -> None:
        """Makes `module` add what adapters add: within its product in 16 bits, behind it in float32 and in GPT-2's own layers."""
        if type(module) is torch.nn.Linear and module.weight.dtype != torch.float32:
            module.__class__ = AddingLinear
        if isinstance(module, PackedLinear):
            module.adds_bias_behind = True
        if isinstance(module, PackedLinear | AddingLinear):
            module.register_forward_pre_hook(lambda _, inputs: self._with_addition(name, inputs[0]))
        else:
            module.register_forward_hook(lambda _, inputs, output: self._add(name, inputs[0], output))

    def _with_addition(self, name: str, inputs: Tensor) -> tuple[Tensor, Tensor] | None:
        """The arguments of an adding layer: its input (…, inputs), and what is added to its output; None if nothing is."""
        if not self._has_product(name, inputs):
            return None
        stack, product = self._stacks[name], self._products[name]
        addition = product @ stack.up if stack.packed_up is None else multiply_packed(product, stack.packed_up, None)
        return inputs, addition.view(*inputs.shape[:-1], stack.up.shape[1])

    def _add(self, name: str, inputs: Tensor, output: Tensor) -> None:
        if self._has_product(name, inputs):
            up = self._stacks[name].up
            output.view(inputs.shape[:-1].numel(), up.shape[1]).addmm_(self._products[name], up)

    def _has_product(self, name: str, inputs: Tensor) -> bool:
        """Whether rows of `inputs` have an adapter with this layer; `_products` has that of their `down` matrices then."""
        rows = self._rows.get(name in self._cross_layers)
        if rows is None or name not in self._stacks:
            return False
        count = inputs.shape[:-1].numel()
        if count != len(rows.owners) > 1:
            raise ModelError(f"{name!r} is computed for {count} rows of {len(rows.owners)}; this model takes no adapters here.")
        if inputs is not self._inputs:
            self._inputs, self._first_layer = inputs, name
            self._multiply(self._same_input.setdefault(name, [name]), rows)
        elif name not in self._products:
            self._same_input[self._first_layer].append(name)
            self._multiply([name], rows)
        return True

    def _multiply(self, names: Sequence[str], rows: _Rows) -> None:
        """Multiplies the input with the `down` matrices of these layers; sets columns of other adapters than the row's to 0."""
        present = tuple(name for name in names if name in self._stacks)
        if present not in self._joint:
            stacks = [self._stacks[name] for name in present]
            self._joint[present] = (
                torch.cat([stack.down for stack in stacks]),
                tuple(place for stack in stacks for place in stack.columns),
                [len(stack.columns) for stack in stacks],
            )
        assert self._inputs is not None
        down, columns, sizes = self._joint[present]
        product = torch.nn.functional.linear(self._inputs.reshape(-1, down.shape[1]), down)
        product.masked_fill_(rows.other_adapters(columns), 0.0)
        self._products = dict(zip(present, product.split(sizes, dim=1), strict=True))


class _Rows:
    """Adapter of each row: `owners` (rows, or 1 for all rows) are indices into the stacked adapters, -1 for none."""

    def __init__(self, owners: Tensor) -> None:
        self.owners = owners
        self._other_masks: dict[tuple[int, ...], Tensor] = {}

    def other_adapters(self, columns: tuple[int, ...]) -> Tensor:
        """Mask (rows, columns), True where a column is not of the row's adapter; shared by layers with the same columns."""
        if columns not in self._other_masks:
            self._other_masks[columns] = self.owners[:, None] != torch.tensor(columns, device=self.owners.device)
        return self._other_masks[columns]


@dataclass(frozen=True)
class _Stack:
    """Stacked matrices of one layer: `down` (all ranks, inputs), `up` (all ranks, outputs), and the adapter index of each rank.

    `packed_up` is `up` for layers that are packed, as they are (`cpu_linear.py`).
    """

    down: Tensor
    up: Tensor
    packed_up: Tensor | None
    columns: tuple[int, ...]
