"""What kind of model a folder holds, from its config.json alone: one that continues a text, or one that reads and then writes.

Knows nothing of weights; imports neither torch nor transformers.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from apprentice.errors import ModelError

Family = Literal["causal", "seq2seq"]
FAMILIES: dict[Family, str] = {"causal": "causal language model", "seq2seq": "sequence-to-sequence model"}
# Sequence-to-sequence types whose positions are relative to one another, so that examples can share a row.
RELATIVE_POSITIONS = ("t5", "mt5", "umt5")
# Types whose activations leave float16's range.
NO_FLOAT16 = ("t5", "mt5", "umt5")


def family_of(folder: Path) -> Family:
    """`seq2seq` for an encoder with a decoder (T5, BART and their kin), otherwise `causal`.

    Raises `ModelError` if `folder` has no config.json that can be read.
    """
    return "seq2seq" if model_config(folder).get("is_encoder_decoder") else "causal"


def can_pack(folder: Path) -> bool:
    """Whether examples of the model in `folder` can share a row and stay apart: false where positions count the whole row."""
    config = model_config(folder)
    return not config.get("is_encoder_decoder") or config.get("model_type") in RELATIVE_POSITIONS


def model_config(folder: Path) -> dict[str, Any]:
    """The model's config.json. Raises `ModelError` if it cannot be read."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(f"{folder} is not a model folder: its config.json cannot be read ({error}).") from error
