"""Writers of a trained model's files, which also score it: tensor by tensor from the checkpoint, or with the whole model in memory.

    StreamedWriter   each parameter is read, merged, cast, written and let go: memory holds about one of them
    WholeWriter      for what cannot be loaded by single tensors (`find_split_obstacle`), and where a model reads parameters outside
                     of their modules: the trained model in float32, and the written one

Both write the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from apprentice.data.encoding.tokenize import Tokenized
from apprentice.errors import TrainingError
from apprentice.models.loading import load_model
from apprentice.models.merge import merge_streamed
from apprentice.models.reward import is_reward
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.models.weights.streamed_weights import StreamedWeights
from apprentice.models.weights.streamed_writer import Digest, write_model
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.train.checkpoint.fidelity import score_examples
from apprentice.train.checkpoint.format import WEIGHT
from apprentice.train.checkpoint.restore import restore_model
from apprentice.train.checkpoint.shard import TensorRange, check_shapes
from apprentice.train.checkpoint.shard_reader import TensorReader

Examples = Sequence[Tokenized]


class ModelWriter(Protocol):
    """Writes the files of a trained model. `expected` are the trained model's scores of the examples, `is_reward` what they are."""

    expected: Tensor
    is_reward: bool
    is_streamed: bool

    def save_adapter(self, folder: Path, base: str) -> None:
        """Writes what the tuning method has added, as an adapter of the model named `base`."""

    def merge(self) -> None:
        """Makes the trained model what is written: plain, in the number format of the export. No adapter can be saved any more."""

    def score_merged(self, examples: Examples) -> Tensor:
        """Scores of the merged model, before it is written."""

    def write(self, folder: Path, target: Folder, digest: Digest) -> None:
        """Writes the weights to `target` and the model's other files to `folder`; `digest` takes in the files of weights."""

    def reload_and_score(self, folder: Path, target: Folder, examples: Examples) -> Tensor:
        """Scores of what was written. Raises `TrainingError` if a weight is not that of the model in training."""


class CheckpointSource:
    """A parameter whose values are a checkpoint's tensor `key`."""

    def __init__(self, reader: TensorReader, key: str) -> None:
        self._reader, self._key = reader, key

    def fill(self, start: int, out: Tensor) -> None:
        """Copies the range of `out`'s length from `start` on."""
        out.copy_(self._reader.read_range(TensorRange(self._key, start, out.numel())))


class StreamedWriter:
    """Writer that holds one tensor at a time, or what a module uses at once; `weights` is where they are read."""

    is_streamed = True

    def __init__(self, recipe: Recipe, reader: TensorReader, dtype: torch.dtype, examples: Examples) -> None:
        self._recipe, self._dtype = recipe, dtype
        self._method = TUNING_METHODS[recipe.tuning.method]
        self._weights = StreamedWeights()
        self._trained = _restore_streamed(recipe, reader, self._weights)
        self._model, self._model_weights = self._trained, self._weights
        self.is_reward = is_reward(self._trained)
        with self._weights.gather_on_use(self._trained):
            self.expected = score_examples(self._trained, examples)

    def save_adapter(self, folder: Path, base: str) -> None:
        """As in `ModelWriter`."""
        assert self._method.save_adapter is not None
        self._method.save_adapter(self._trained, folder, base)

    def merge(self) -> None:
        """As in `ModelWriter`."""
        if self._method.merge is None:
            self._model_weights = StreamedWeights()
            settings: dict[str, Any] = {"trust": self._recipe.model.trust, "splitter": self._model_weights}
            self._model = load_model(self._recipe.model.base, self._dtype, **settings)
            return
        self._model = self._trained = merge_streamed(self._trained, self._weights)
        self._weights.cast(self._model, self._dtype)

    def score_merged(self, examples: Examples) -> Tensor:
        """As in `ModelWriter`; an adapter that is not merged counts as it was trained."""
        if self._method.merge is None:
            return self.expected
        with self._weights.gather_on_use(self._trained):
            return score_examples(self._trained, examples)

    def write(self, folder: Path, target: Folder, digest: Digest) -> None:
        """As in `ModelWriter`."""
        write_model(self._model, self._model_weights, folder, target, digest)

    def reload_and_score(self, folder: Path, target: Folder, examples: Examples) -> Tensor:
        """As in `ModelWriter`."""
        weights = StreamedWeights()
        settings: dict[str, Any] = {"head": 0 if self.is_reward else None, "trust": self._recipe.model.trust}
        reloaded = load_model(folder, self._dtype, **settings, splitter=weights, weights=target)
        _check_same(self._trained, reloaded, self._dtype, self._weights, weights)
        with weights.gather_on_use(reloaded):
            return score_examples(reloaded, examples)


class WholeWriter:
    """Writer that holds the trained model in float32, and then the written one beside it."""

    is_streamed = False

    def __init__(self, recipe: Recipe, reader: TensorReader, dtype: torch.dtype, examples: Examples) -> None:
        self._recipe, self._dtype = recipe, dtype
        self._method = TUNING_METHODS[recipe.tuning.method]
        self._model: Any = restore_model(recipe, reader.read, torch.float32, attention="auto", quantized=False).eval()
        self.is_reward = is_reward(self._model)
        self.expected = score_examples(self._model, examples)

    def save_adapter(self, folder: Path, base: str) -> None:
        """As in `ModelWriter`."""
        assert self._method.save_adapter is not None
        self._method.save_adapter(self._model, folder, base)

    def merge(self) -> None:
        """As in `ModelWriter`."""
        if self._method.merge is not None:
            merged: nn.Module = self._method.merge(self._model, self._dtype)
            self._model = merged.to(self._dtype)

    def score_merged(self, examples: Examples) -> Tensor:
        """As in `ModelWriter`."""
        return score_examples(self._model, examples)

    def write(self, folder: Path, target: Folder, digest: Digest) -> None:
        """As in `ModelWriter`; `target` must be `folder`, and nothing is hashed."""
        model = self._model
        if self._method.merge is None:
            model = load_model(self._recipe.model.base, self._dtype, trust=self._recipe.model.trust)
        model.save_pretrained(folder)

    def reload_and_score(self, folder: Path, target: Folder, examples: Examples) -> Tensor:
        """As in `ModelWriter`."""
        reloaded = load_model(folder, self._dtype, head=0 if self.is_reward else None, trust=self._recipe.model.trust)
        in_memory = StreamedWeights()
        _check_same(self._model, reloaded, self._dtype, in_memory, in_memory)
        return score_examples(reloaded, examples)


def create_writer(recipe: Recipe, reader: TensorReader, dtype: torch.dtype, examples: Examples, *, streamed: bool) -> ModelWriter:
    """The writer of the model of `recipe` in a checkpoint, which has scored the trained model on `examples`."""
    if streamed:
        writer = StreamedWriter(recipe, reader, dtype, examples)
        if bool(writer.expected.isfinite().all()):
            return writer
        del writer  # the architecture reads weights outside of their modules: all must be in memory
    return WholeWriter(recipe, reader, dtype, examples)


@torch.no_grad()
def _restore_streamed(recipe: Recipe, reader: TensorReader, weights: StreamedWeights) -> Any:
    """The trained model of `recipe`: frozen weights streamed from the base's files, trained ones from the checkpoint."""
    model = restore_model(recipe, None, torch.float32, attention="auto", quantized=False, splitter=weights).eval()
    trained = {f"{WEIGHT}/{name}": parameter for name, parameter in trainable_parameters(model).items()}
    saved = {key: shape for key, shape in reader.shapes.items() if key in trained}
    check_shapes(saved, {key: tuple(parameter.shape) for key, parameter in trained.items()})
    for key, parameter in trained.items():
        if weights.is_streamed(parameter):
            weights.replace_source(parameter, CheckpointSource(reader, key))
        else:
            parameter.copy_(reader.read(key))
    return model


def _check_same(
    model: nn.Module, reloaded: nn.Module, dtype: torch.dtype, weights: StreamedWeights, reloaded_weights: StreamedWeights
) -> None:
    """Raises `TrainingError` for the first tensor of `model` that is not the same, in `dtype`, in the model that was written."""
    others = reloaded.state_dict(keep_vars=True)

    def read(tensor: Any, source: StreamedWeights) -> Tensor:
        return (source.read(tensor) if isinstance(tensor, nn.Parameter) else tensor).to(dtype)

    for name, tensor in model.state_dict(keep_vars=True).items():
        if name not in others or not torch.equal(read(tensor, weights), read(others[name], reloaded_weights)):
            raise TrainingError(f"{name!r} is not the same in the exported model as in training; check the disk, and export again.")
