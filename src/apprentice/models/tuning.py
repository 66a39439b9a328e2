"""Tuning methods: how each wraps the model, and what of it is saved.

A method is one entry of `TUNING_METHODS`; the training loop is the same for all. A wrapped model's trainable parameters are
those with `requires_grad`. Knows nothing of optimizers, workers or checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apprentice.errors import ModelError
from apprentice.recipe import Tuning


@dataclass(frozen=True)
class TuningMethod:
    """`wrap(model, tuning, seed)` freezes and adds; `merge` gives a plain model back; `save_adapter` writes the
    added weights into a folder, with the name of the base model."""

    wrap: Callable[[PreTrainedModel, Tuning, int], nn.Module]
    merge: Callable[[Any], PreTrainedModel]
    save_adapter: Callable[[Any, Path, str], None] | None = None


def _wrap_full(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    return model.requires_grad_(True)


def _wrap_lora(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=tuning.rank,
        lora_alpha=tuning.alpha or 2 * tuning.rank,  # type: ignore[arg-type]  # a float is fine
        lora_dropout=tuning.dropout,
        target_modules="all-linear",
    )
    with torch.random.fork_rng(), _quiet():
        torch.manual_seed(seed)  # the same first weights on every worker
        return get_peft_model(model, config)


def _save_peft(model: Any, folder: Path, base: str) -> None:
    model.peft_config["default"].base_model_name_or_path = base  # not the folder it was loaded from here
    with _quiet():
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TUNING_METHODS: dict[str, TuningMethod] = {
    "full": TuningMethod(wrap=_wrap_full, merge=lambda model: model),
    "lora": TuningMethod(wrap=_wrap_lora, merge=lambda model: model.merge_and_unload(), save_adapter=_save_peft),
}


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name → parameter, of all that training changes; a parameter that two modules share has one name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_trainable(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` over the trainable parameters. Raises `ModelError` unless names and shapes are the same."""
    parameters = trainable(model)
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ModelError(f"the saved weights are not those of this model: {odd[0]!r} is in only one of them; use the run's recipe.")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)} is not {tuple(parameter.shape)}"
            raise ModelError(f"the saved weights are not those of this model: {name!r} {shapes}; use the recipe of the run.")
        parameter.copy_(weights[name])
