"""Random LoRA adapters in PEFT's format, and the model that each of them makes of its base."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from apprentice.run.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS

ALPHA = 8


def random_lora(model: Any, folder: Path, seed: int, *, rank: int = 4, only: str = "", **config: Any) -> Path:
    """Writes an adapter for the linear layers of `model` whose names contain `only`, strong enough to change what it says."""
    made = torch.Generator().manual_seed(seed)
    head = model.get_output_embeddings()
    tensors = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head and only in name:
            for key, shape in (("A", (rank, module.in_features)), ("B", (module.out_features, rank))):
                tensors[f"base_model.model.{name}.lora_{key}.weight"] = torch.randn(shape, generator=made) * 0.15
    folder.mkdir(parents=True)
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    chosen = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "base_model_name_or_path": "tiny",
        "target_modules": "all-linear",
    }
    (folder / ADAPTER_CONFIG).write_text(json.dumps(chosen | config))
    return folder


def merged(model: Any, folder: Path) -> Any:
    """A copy of `model` whose weights have PEFT's adapter in `folder` added."""
    from safetensors.torch import load_file

    other = copy.deepcopy(model)
    modules = dict(other.named_modules())
    rank = json.loads((folder / ADAPTER_CONFIG).read_text())["r"]
    tensors = load_file(folder / ADAPTER_WEIGHTS)
    with torch.no_grad():
        for name in tensors:
            if name.endswith("lora_A.weight"):
                module = modules[name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")]
                module.weight += tensors[name.replace("lora_A", "lora_B")] @ tensors[name] * (ALPHA / rank)
    return other
