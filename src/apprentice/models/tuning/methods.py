"""Tuning methods: full fine-tuning, LoRA, QLoRA, prefix, prompt and adapter tuning.

A method is one entry of `TUNING_METHODS`, which says how to wrap a model, save what was added and merge it. The training loop is
the same for all. Trainable parameters are those with `requires_grad`.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from apprentice.errors import ModelError, RecipeError
from apprentice.models.loading import REWARD_HEAD
from apprentice.models.tuning.bottleneck import add_adapters, save_adapters
from apprentice.models.tuning.experts import expert_parameters
from apprentice.models.tuning.lora_forward import add_before_rounding
from apprentice.models.tuning.lora_merge import merge_lora
from apprentice.models.tuning.virtual_tokens import start_from_common_words
from apprentice.recipe import Tuning

RSLORA_ALPHA = 16  # the same for all ranks, as in the paper's experiments


@dataclass(frozen=True)
class TuningMethod:
    """Functions of a tuning method.

    `wrap(model, tuning, seed)` freezes the base and adds trainable weights. `save_adapter(model, folder, base)` writes the added
    weights and the name of the base model. `merge(model, dtype)` returns a plain model with the same outputs, whose changed weights
    are in `dtype` (None: in their own format); a method without it is exported as base weights with the adapter beside them.
    `four_bit` quantizes the frozen base to 4 bits. With `virtual_tokens` trained vectors stand before every row, which therefore
    holds one example.
    """

    wrap: Callable[[PreTrainedModel, Tuning, int], nn.Module]
    merge: Callable[..., PreTrainedModel] | None = None
    save_adapter: Callable[[Any, Path, str], None] | None = None
    four_bit: bool = False
    virtual_tokens: bool = False


def _wrap_full(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    return model.requires_grad_(True)


def _wrap_lora(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    from peft import LoraConfig

    experts = expert_parameters(model) if tuning.experts else []
    if tuning.experts and not experts:
        raise RecipeError(f"tuning.experts is for mixture-of-experts models, and {model.config.model_type} has none; leave it out.")
    config = LoraConfig(
        task_type=_task_type(model),
        r=tuning.rank,
        lora_alpha=tuning.alpha or (RSLORA_ALPHA if tuning.rslora else 2 * tuning.rank),  # type: ignore[arg-type]  # a float is fine
        lora_dropout=tuning.dropout,
        use_rslora=tuning.rslora,
        use_dora=tuning.dora,
        target_modules="all-linear",
        target_parameters=experts or None,
    )
    wrapped = _wrap_with_peft(model, config, seed)
    add_before_rounding(wrapped)
    return wrapped


def _wrap_prefix(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    from peft import PrefixTuningConfig

    return _wrap_with_virtual_tokens(model, PrefixTuningConfig, tuning, seed)


def _wrap_prompt(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    from peft import PromptTuningConfig

    return _wrap_with_virtual_tokens(model, PromptTuningConfig, tuning, seed)


def _wrap_with_virtual_tokens(model: PreTrainedModel, config: Any, tuning: Tuning, seed: int) -> nn.Module:
    wrapped = _wrap_with_peft(model, config(task_type=_task_type(model), num_virtual_tokens=tuning.virtual_tokens), seed)
    start_from_common_words(wrapped, seed)
    return wrapped


def _wrap_adapter(model: PreTrainedModel, tuning: Tuning, seed: int) -> nn.Module:
    model.requires_grad_(False)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        add_adapters(model, tuning.width)
    return model


def _task_type(model: PreTrainedModel) -> Any:
    if hasattr(model, REWARD_HEAD):
        return "SEQ_CLS"  # so that peft trains the new output layer too
    return "SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM"


def _wrap_with_peft(model: PreTrainedModel, config: Any, seed: int) -> nn.Module:
    from peft import get_peft_model

    with torch.random.fork_rng(), _without_warnings():
        torch.manual_seed(seed)  # the same first weights on every worker
        wrapped: nn.Module = get_peft_model(model, config)
    return wrapped


def _save_peft(model: Any, folder: Path, base: str) -> None:
    model.peft_config["default"].base_model_name_or_path = base  # not the folder it was loaded from here
    with _without_warnings():
        model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)  # peft's model card is an empty form


@contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


TUNING_METHODS: dict[str, TuningMethod] = {
    "full": TuningMethod(_wrap_full, merge=lambda model, dtype=None: model),
    "lora": TuningMethod(_wrap_lora, merge_lora, _save_peft),
    "qlora": TuningMethod(_wrap_lora, merge_lora, _save_peft, four_bit=True),
    "prefix": TuningMethod(_wrap_prefix, save_adapter=_save_peft, virtual_tokens=True),
    "prompt": TuningMethod(_wrap_prompt, save_adapter=_save_peft, virtual_tokens=True),
    "adapter": TuningMethod(_wrap_adapter, save_adapter=save_adapters),
}


def check_tuning(tuning: Tuning) -> None:
    """Raises `RecipeError` for a method in 4 bits where bitsandbytes is not installed."""
    if TUNING_METHODS[tuning.method].four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise RecipeError(
            f"tuning.method {tuning.method} keeps the base model in 4 bits by the package bitsandbytes, which is not installed;"
            " pip install 'apprentice[qlora]', or use lora."
        )


def count_trainable(model: nn.Module) -> tuple[int, float]:
    """Number of trainable parameters, and their share (0 to 1) of all parameters."""
    trained = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    return trained, trained / max(sum(parameter.numel() for parameter in model.parameters()), 1)


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trainable parameters by name; a parameter that two modules share is listed once."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_trainable(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copies `weights` into the trainable parameters of `model`, getting one at a time.

    Raises `ModelError` unless names and shapes are the same.
    """
    parameters = trainable_parameters(model)
    if parameters.keys() != weights.keys():
        odd = sorted(parameters.keys() ^ weights.keys())
        raise ModelError(f"the saved weights are not those of this model: {odd[0]!r} is in only one of them; use the run's recipe.")
    for name, parameter in parameters.items():
        weight = weights[name]
        if parameter.shape != weight.shape:
            shapes = f"{tuple(weight.shape)} is not {tuple(parameter.shape)}"
            raise ModelError(f"the saved weights are not those of this model: {name!r} {shapes}; use the recipe of the run.")
        parameter.copy_(weight)
