"""Merging of adapters into their base model: a PEFT folder into a plain model folder, or single tensors as they are read."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from pickle import UnpicklingError  # nosec B403
from typing import Any

import torch

from apprentice.errors import ModelError
from apprentice.models.loading import load_model
from apprentice.models.tuning.lora_merge import layers_by_weight, merge_lora
from apprentice.models.weights.streamed_weights import StreamedWeights
from apprentice.pretrained.hub import local_folder
from apprentice.pretrained.trust import check_adapter_folder
from apprentice.run.identity import ADAPTER_CONFIG


def merge_adapter(adapter: Path, target: Path, dtype: torch.dtype = torch.float32, *, trust: bool = False) -> Path:
    """Writes the base model of the PEFT folder `adapter` to `target`, the adapter merged into it, in `dtype`; returns `target`.

    Raises `ModelError` if the adapter names no base model or does not fit it; and, unless `trust`, if either is a pickle.
    """
    from peft import PeftModel

    check_adapter_folder(adapter, trust=trust)
    config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    name = config.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{adapter} does not say which base model it belongs to (base_model_name_or_path).")
    base = local_folder(str(name), trust=trust)
    model: Any = load_model(base, torch.float32, trust=trust)
    try:
        with warnings.catch_warnings():  # peft uses a deprecated attribute of transformers
            warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing", category=FutureWarning)
            merged = merge_lora(PeftModel.from_pretrained(model, str(adapter)), dtype).to(dtype)
    except (RuntimeError, ValueError, OSError, UnpicklingError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"the adapter in {adapter} does not fit its base {name}: {reason}") from error
    merged.save_pretrained(target)
    for file in base.iterdir():
        if (
            file.is_file()
            and not file.name.endswith(".safetensors")
            and not (target / file.name).exists()
            and "index" not in file.name
        ):
            shutil.copy(file, target / file.name)
    return target


def merge_streamed(model: Any, weights: StreamedWeights) -> Any:
    """The plain model in `model`, whose weights are streamed: what its tuning method adds is merged whenever a weight is read.

    Each layer is merged by its own `merge` of peft, so that the numbers are those of `merge_lora`.
    """
    layers_of = layers_by_weight(model)
    for weight, layers in layers_of.items():
        for layer in layers:
            weights.merge_on_read(weight, layer)
    return model.unload() if layers_of else model
