"""Safety checks of model and adapter folders: weights must be safetensors, and the architecture one that transformers has.

A pickle can run any code when it is read, and so can a model's own modules. Both are refused before they are opened, unless the
recipe sets `model.trust`, or the command line has `--trust`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from apprentice.errors import ModelError
from apprentice.pretrained.architecture import model_config
from apprentice.pretrained.hub import is_from_hub
from apprentice.run.identity import ADAPTER_CONFIG

PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# transformers 5.23 reads `attn_implementation`, `_attn_implementation`, and the same of `experts`; older ones `…_internal` too.
_IMPLEMENTATION = re.compile("(attn|attention|experts)_implementation")
_BUILT_IN = ("eager", "sdpa", "grouped_mm", "batched_mm")  # `flash_attention_2` is fetched where its package is missing
REMEDY = "Save it again as safetensors (`save_pretrained`)"


def check_model_folder(folder: Path, *, trust: bool = False) -> None:
    """Raises `ModelError` if loading the model in `folder` would read a pickle or run code that came with it.

    A folder passes with pickles beside safetensors, which are never read, and with code for an architecture that transformers has,
    which is never run. With `trust` only config.json must be readable.
    """
    config = model_config(folder)
    if trust:
        return
    named = [*_shards(folder), str(config.get("transformers_weights") or "model.safetensors")]
    if odd := [name for name in named if not name.endswith(".safetensors") or "/" in name or "\\" in name]:
        raise ModelError(f"{folder} names {odd[0]!r} as a file of weights; only safetensors files of the folder itself are read.")
    if not any(folder.glob("*.safetensors")) and (pickles := _pickles(folder)):
        raise ModelError(
            f"{folder} has its weights as a pickle ({pickles[0]}), which can run any code when it is read. {REMEDY}, or, if you"
            " trust its author, say --trust (model.trust=true in a recipe)."
        )
    if is_from_hub(folder) and not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"{folder} has no weights as safetensors on the hub, and pickles (`.bin`), which can run any code when they are read,"
            " are not fetched. Take another model, or, if you trust its author, say --trust (model.trust=true in a recipe)."
        )
    for adapter in (folder, folder / "adapter"):
        if (adapter / ADAPTER_CONFIG).is_file():
            check_adapter_folder(adapter)
    if config.get("auto_map") and not _is_known(config):
        raise ModelError(
            f"{folder} brings its own code for the architecture {config.get('model_type')!r}, which transformers does not have."
            " Take another model, or, if you trust its author, say --trust (model.trust=true in a recipe)."
        )
    if choices := _implementations(config):
        key, name = choices[0]
        raise ModelError(
            f"{folder} says in its config.json that {key} is {name!r}, by which transformers may fetch code from a hub; remove the"
            " key, and say in the recipe's model.attention what is to be used."
        )


def check_adapter_folder(folder: Path, *, trust: bool = False) -> None:
    """Raises `ModelError` if loading the adapter in `folder` would read a pickle, unless `trust`."""
    if not trust and not any(folder.glob("adapter_model*.safetensors")) and (pickles := _pickles(folder)):
        raise ModelError(
            f"{folder} has its adapter as a pickle ({pickles[0]}), which can run any code when it is read. {REMEDY}, or, if you"
            " trust its author, say --trust (model.trust=true in a recipe)."
        )


def _implementations(value: Any) -> list[tuple[str, Any]]:
    """(key, value) of all keys in a config, nested ones too, that choose an attention or experts implementation from elsewhere."""
    if isinstance(value, list):
        return [choice for item in value for choice in _implementations(item)]
    if not isinstance(value, dict):
        return []
    choices = [(key, name) for key, name in value.items() if _IMPLEMENTATION.search(key) and not _is_built_in(name)]
    return choices + [inner for item in value.values() for inner in _implementations(item)]


def _is_built_in(name: Any) -> bool:
    if isinstance(name, dict):  # by the names of nested configs
        return all(map(_is_built_in, name.values()))
    return name is None or isinstance(name, bool) or name in _BUILT_IN


def _pickles(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if file.suffix in PICKLED)


def _shards(folder: Path) -> list[str]:
    """File names in the index of a sharded model; empty without an index."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return []
    try:
        return sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ModelError(f"{index} cannot be read ({error}); fetch the model again.") from error


def _is_known(config: dict[str, Any]) -> bool:
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING
