"""A recipe small enough for tests: the built-in tasks, the tiny random model, a few steps."""

from __future__ import annotations

from pathlib import Path

import yaml


def gpu_recipe(folder: Path, model: Path, method: str = "full", **overrides: object) -> Path:
    """Writes a recipe as one trains on GPUs, with rows of 4,096 tokens in bfloat16 at stage 3, into `folder`. Gives the file."""
    usual: dict[str, object] = {
        "data__packing": {"length": 4096},
        "data__max_length": 2048,
        "model__dtype": "bfloat16",
        "training__global_batch": 64,
        "training__deepspeed": {"stage": 3},
        "tuning": {"method": method},
    }
    return tiny_recipe(folder, model, **usual | overrides)


def tiny_recipe(folder: Path, model: Path, **overrides: object) -> Path:
    """Writes `recipe.yaml` into `folder`; `overrides` are `a__b=value` for key a.b. Gives the file."""
    content: dict = {
        "name": "tiny",
        "seed": 3,
        "storage": str(folder / "runs"),
        "model": {"base": str(model), "dtype": "float32"},
        "data": {
            "tasks": ["quickstart"],
            "hold_out": ["topic"],
            "max_length": 256,
            "packing": {"length": 256},
            "window": 64,
            "formats": {"zero_shot": 0.8, "few_shot": 0.1, "inverted": 0.1},
        },
        "tuning": {"method": "lora", "rank": 4},
        "training": {
            "workers": 2,
            "steps": 4,
            "global_batch": 4,
            "optimizer": {"learning_rate": 0.001, "warmup_steps": 1},
            "checkpoint": {"every_steps": 2},
        },
        "evaluation": {"max_examples": 4, "max_new_tokens": 8},
        "serving": {"port": 0, "context": 512, "max_running": 4},
    }
    for key, value in overrides.items():
        *parents, last = key.split("__")
        place = content
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return file
