"""LoRA adapters over one base: each text is computed with its own adapter, texts of several adapters in one pass.

What adapters add to a layer is two thin matrix products for all rows, however many adapters there are. The `down` matrices of the
pass stand on top of each other, what is not of a row's own adapter is set to zero in between, and the `up` matrices stand side by
side:

    rows       x with adapter a (rank 2), y with b (rank 1), z with none
    down       x: [a1 a2 b1]   y: [a1 a2 b1]   z: [a1 a2 b1]
    own alone  x: [a1 a2  0]   y: [ 0  0 b1]   z: [ 0  0  0]
    up         adds to x what a adds, to y what b adds, and zeros to z

The base's weights are read once a pass, and never changed. Knows nothing of requests, or of when adapters come and go.
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
from apprentice.pretrained.trust import check_adapter_folder

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_MATRIX = re.compile(r"(.+)\.lora_([AB])\.weight")
# Ways to begin that change the base's own weights, so that what is saved does not belong to the base as it is.
_CHANGING = ("pissa", "olora", "corda", "loftq")
_numbers = itertools.count(1)


@dataclass(frozen=True, eq=False)
class Lora:
    """One adapter in memory: for each layer that it changes `down` (rank, inputs) and `up` (rank, outputs), the scale in `up`.

    `number` is no other adapter's, of this process.
    """

    layers: Mapping[str, tuple[Tensor, Tensor]]
    number: int = field(default_factory=lambda: next(_numbers))


def read_lora(folder: Path, model: Any) -> Lora:
    """The adapter in `folder`, in PEFT's format, for `model`. Raises `ModelError` for one that is no LoRA of this model."""
    check_adapter_folder(folder)
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"the adapter in {folder} cannot be read ({error.__class__.__name__}); save it again.") from error
    _check_kind(folder, config)
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if (found := _MATRIX.fullmatch(name.removeprefix(_PREFIX))) is None:
            raise ModelError(f"the adapter in {folder} has {name!r} besides LoRA's two matrices; merge it and serve the result.")
        pairs.setdefault(found[1], {})[found[2]] = tensor
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
        # A copy: what safetensors gives lies in the file, which may be replaced.
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
    """Whether matrices of these shapes add to what `module` computes, a linear layer; GPT-2's have their weight on its side."""
    shape: Sequence[int] = getattr(getattr(module, "weight", None), "shape", ())
    if len(shape) != 2 or len(down) != 2 or len(up) != 2 or isinstance(module, torch.nn.Embedding):
        return False
    outputs, inputs = shape if isinstance(module, torch.nn.Linear) else (shape[1], shape[0])
    return (down[1], up[0], down[0]) == (inputs, outputs, up[1])


def _scale(config: Mapping[str, Any], name: str, rank: int) -> float:
    """What PEFT multiplies the product of the two matrices with."""
    alpha = float(config.get("lora_alpha") or rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = float(value)
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


class LoraLayers:
    """`model` with the adapters of the rows that are computed; one pass at a time. The layers `apart` are given rows of their own.

    Layers that are given the same tensor, such as those of queries, keys and values, share one product with all their `down`
    matrices; which they are is seen in the first pass.
    """

    def __init__(self, model: Any, apart: Collection[str] = ()) -> None:
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._apart = frozenset(apart)
        self._device = model.device
        self._hooked: set[str] = set()
        self._stacked: tuple[Lora, ...] = ()
        self._stacks: dict[str, _Stack] = {}
        self._alike: dict[str, list[str]] = {}  # the first layer that is given a tensor → all that are
        # Of layers that share a product: all their `down` matrices, whose each column is, how many are each layer's.
        self._joint: dict[tuple[str, ...], tuple[Tensor, tuple[int, ...], list[int]]] = {}
        self._rows: dict[bool, _Rows | None] = {}  # of the layers that are apart (True), and of all others
        self._given: Tensor | None = None
        self._leader = ""
        self._products: dict[str, Tensor] = {}  # of the layers that share `_given`

    @contextmanager
    def rows(
        self,
        adapters: Sequence[Lora | None],
        counts: Sequence[int],
        apart: tuple[Sequence[Lora | None], Sequence[int]] = ((), ()),
    ) -> Iterator[None]:
        """Within it, the model's rows are `counts[0]` of `adapters[0]`, then `counts[1]` of `adapters[1]`, and so on.

        Of a single adapter are all rows, however many. `apart` are those of the layers that are apart.
        """
        wanted = {adapter for adapter in (*adapters, *apart[0]) if adapter is not None}
        if not wanted:
            yield
            return
        if not wanted <= set(self._stacked):
            self._stack(tuple(sorted(wanted, key=lambda adapter: adapter.number)))
        self._rows = {False: self._owned(adapters, counts), True: self._owned(*apart)}
        try:
            yield
        except BaseException:
            self._stacked = ()  # an adapter that cannot be applied is not left among those of the next pass
            raise
        finally:
            self._rows, self._products, self._given = {}, {}, None

    def _owned(self, adapters: Sequence[Lora | None], counts: Sequence[int]) -> _Rows | None:
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
            self._stacks[name] = _Stack(torch.cat([down for _, (down, _) in own]), torch.cat([up for _, (_, up) in own]), columns)
            if name not in self._hooked:
                self._hooked.add(name)
                self._modules[name].register_forward_hook(lambda _, given, output, name=name: self._add(name, given[0], output))

    def _add(self, name: str, given: Tensor, output: Tensor) -> None:
        rows = self._rows.get(name in self._apart)
        if rows is None or name not in self._stacks:
            return
        count = given.shape[:-1].numel()
        if count != len(rows.owners) > 1:
            raise ModelError(f"{name!r} is computed for {count} rows of {len(rows.owners)}; this model takes no adapters here.")
        if given is not self._given:
            self._given, self._leader = given, name
            self._multiply(self._alike.setdefault(name, [name]), rows)
        elif name not in self._products:
            self._alike[self._leader].append(name)
            self._multiply([name], rows)
        output.view(count, -1).addmm_(self._products[name], self._stacks[name].up)

    def _multiply(self, names: Sequence[str], rows: _Rows) -> None:
        """What is given, times the `down` matrices of these layers; zeros where a column is not of the row's adapter."""
        there = tuple(name for name in names if name in self._stacks)
        if there not in self._joint:
            stacks = [self._stacks[name] for name in there]
            self._joint[there] = (
                torch.cat([stack.down for stack in stacks]),
                tuple(place for stack in stacks for place in stack.columns),
                [len(stack.columns) for stack in stacks],
            )
        assert self._given is not None
        down, columns, sizes = self._joint[there]
        product = torch.nn.functional.linear(self._given.reshape(-1, down.shape[1]), down).masked_fill_(rows.others(columns), 0.0)
        self._products = dict(zip(there, product.split(sizes, dim=1), strict=True))


class _Rows:
    """Whose the rows of a layer are: `owners` (rows, or 1 for all), the place of an adapter among the stacked ones, -1 for none."""

    def __init__(self, owners: Tensor) -> None:
        self.owners = owners
        self._others: dict[tuple[int, ...], Tensor] = {}

    def others(self, columns: tuple[int, ...]) -> Tensor:
        """True where a column is not of the row's adapter, (rows, columns); all layers of one shape share it."""
        if columns not in self._others:
            self._others[columns] = self.owners[:, None] != torch.tensor(columns, device=self.owners.device)
        return self._others[columns]


@dataclass(frozen=True)
class _Stack:
    """One layer's matrices of all adapters of a pass: `down` (all ranks, inputs), `up` (all ranks, outputs), whose each rank is."""

    down: Tensor
    up: Tensor
    columns: tuple[int, ...]
