"""On-policy runs small enough for tests: a reward model with random numbers, and a recipe whose rounds take two steps."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.support.preferences import write_pairs
from tests.support.recipes import tiny_recipe

ROUND = {"data__window": 8, "training__grpo__group": 4}  # 32 replies, two a row: 16 rows, two steps of 8


def reward_model(folder: Path, base: Path) -> Path:
    """A model that gives answers numbers, with the tokenizer of `base`."""
    import torch

    from apprentice.models.loading import load_model

    model: Any = load_model(base, torch.float32, head=5)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(base / name, folder)
    return folder


def round_recipe(folder: Path, model: Path, **changes: Any) -> Path:
    """Two rounds over questions about colours; the reward model is made in `folder` unless `changes` name one."""
    if "training__grpo__reward" not in changes:
        changes["training__grpo__reward"] = str(reward_model(folder / "reward", model))
    folder.mkdir(exist_ok=True)
    file = write_pairs(folder / "pairs.jsonl")
    chosen: dict[str, Any] = ROUND | {
        "data__tasks": [{"preferences": str(file), "test": str(file)}],
        "data__hold_out": [],
        "data__formats": {},
        "data__max_length": 96,
        "data__packing": {"length": 192},
        "training__objective": "grpo",
        "training__grpo__max_new_tokens": 8,
        "training__steps": 4,
        "training__global_batch": 8,
        "training__optimizer": {"learning_rate": 0.01, "schedule": "constant"},
    }
    return tiny_recipe(folder, model, **(chosen | changes))
