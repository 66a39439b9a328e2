"""Base weights and exported runs to a causal or sequence-to-sequence model in memory, quietly, in the number format that the
hardware multiplies fast.

Knows nothing of tuning methods, layouts or where a model is used.
"""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from apprentice.errors import ModelError
from apprentice.family import FAMILIES, family_of
from apprentice.hub import local_folder

FAST_BFLOAT16 = ("amx_bf16", "avx512_bf16")  # what a CPU multiplies bfloat16 with, as PyTorch names it
_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def resolve_dtype(name: str, device: str | None = None) -> torch.dtype:
    """The number format that `name` ("auto", "bfloat16" or "float32") means on `device` ("cuda" or "cpu"; None: what there is).

    `auto` is bfloat16 on a GPU, on CPUs with AMX (matrix products about five times faster than in float32) and on CPUs with
    AVX512-BF16 (about twice), and float32 on all other CPUs, which only emulate bfloat16.
    """
    if name != "auto":
        return _DTYPES[name]
    on_gpu = torch.cuda.is_available() if device is None else device == "cuda"
    here = torch.cpu.get_capabilities()
    fast = on_gpu or any(here.get(unit, False) for unit in FAST_BFLOAT16)
    return torch.bfloat16 if fast else torch.float32


def load_model(base: str | Path, dtype: torch.dtype, attention: str = "auto") -> PreTrainedModel:
    """The model `base` (folder, hub id or packaged model) on the CPU, in evaluation mode; `apprentice.family` tells which kind.

    Raises `ModelError` if it cannot be found, is no language model, or lacks weights.
    """
    folder = local_folder(str(base))
    family = family_of(folder)
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    chosen = {} if attention == "auto" else {"attn_implementation": attention}
    loader: Any = AutoModelForSeq2SeqLM if family == "seq2seq" else AutoModelForCausalLM
    try:
        model, found = loader.from_pretrained(folder, dtype=dtype, local_files_only=True, output_loading_info=True, **chosen)
    except (OSError, ValueError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ModelError(f"{folder} cannot be loaded as a {FAMILIES[family]}: {reason}") from error
    if missing := sorted(found["missing_keys"]):
        raise ModelError(f"{folder} lacks weights, {missing[0]!r} among them; fetch or export the model again.")
    loaded: PreTrainedModel = model.eval()
    return loaded


def count_parameters(folder: Path) -> int:
    """Numbers in the safetensors files of `folder`, from their headers alone; 0 if there are none."""
    total = 0
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as stream:
            (size,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(size))
        total += sum(math.prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
    return total
