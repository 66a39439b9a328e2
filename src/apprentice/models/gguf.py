"""Reader of GGUF files, and converter to a safetensors folder with tokenizer: `python -m apprentice.models.gguf FILE FOLDER`.

A program of its own, so that the memory of the conversion is freed when it ends.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel


def load_gguf(gguf: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The dequantised model in the file `gguf`, in `dtype`."""
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=dtype,
        attn_implementation="eager",
    )
    model.eval()
    return model


def convert_gguf(gguf: Path, target: Path) -> None:
    """Writes the dequantised model in bfloat16, and the tokenizer, to `target`."""
    model = load_gguf(gguf, torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def main() -> None:
    """Converts the file of the first command-line argument to the folder of the second."""
    convert_gguf(Path(sys.argv[1]), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
