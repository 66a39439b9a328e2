"""The export of a model of more than a gigabyte, in a process whose peak memory is measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.models.loading import count_parameters, load_model
from apprentice.models.tuning.methods import TUNING_METHODS, trainable_parameters
from apprentice.recipe import Recipe
from apprentice.storage import Folder
from apprentice.train.state import State
from tests.support.checkpoints import save

SIZES = {"vocab_size": 32_000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 6, "num_attention_heads": 16}
LARGEST = 32_000 * 2048  # numbers of the embedding
EXPORT = """
import json, sys
from pathlib import Path
from apprentice.data.encoding.prompt_format import Layout
from apprentice.data.encoding.tokenize import Tokenized
from apprentice.data.window import Probe
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import Run
from apprentice.storage import Folder
from apprentice.train.checkpoint.format import find_newest
from apprentice.train.checkpoint.model_export import export_model

recipe = Recipe.model_validate(json.loads(sys.argv[1]))
run = Run(Folder.at(sys.argv[2]))
probe = Probe("validation", tuple(Tokenized(list(range(3, 3 + size)), 4, 0, None) for size in (30, 64)))
export_model(recipe, run, find_newest(run.checkpoints), Layout("chat", Tokenizer(Path(recipe.model.base))), probe)
status = Path("/proc/self/status").read_text()  # `ru_maxrss` would be the parent's, which is larger
print(json.dumps({"peak": 1024 * int(status.partition("VmHWM:")[2].split()[0])}))
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_peak_is_below_three_times_the_largest_tensor_and_a_gigabyte(tiny_model: Path, tmp_path: Path, method: str) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, dtype=torch.bfloat16)).bfloat16().save_pretrained(base)
    values = {
        "name": "large",
        "model": {"base": str(base)},
        "data": {"tasks": ["t"], "max_length": 512},
        "tuning": {"method": method},
        "training": {"steps": 1},
    }
    made = Recipe.model_validate(values)
    model = TUNING_METHODS[method].wrap(load_model(base, torch.bfloat16), made.tuning, made.seed)
    tensors = ((f"weight/{name}", value.detach().float() + 0.001) for name, value in trainable_parameters(model).items())
    save(Folder.at(tmp_path / "run" / "checkpoints"), tensors, State(step=1), {"dtype": "bfloat16"})
    del model
    arguments = [sys.executable, "-c", EXPORT, json.dumps(values), str(tmp_path / "run")]
    result = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=1500)
    assert result.returncode == 0, result.stderr[-3000:]
    peak = json.loads(result.stdout.splitlines()[-1])["peak"]
    print(f"{method}: {count_parameters(base) / 1e6:.0f}M numbers, peak {peak / 1e6:.0f} MB")
    assert count_parameters(tmp_path / "run" / "model") == count_parameters(base) > 5e8
    assert peak < 3 * 4 * LARGEST + 1e9
