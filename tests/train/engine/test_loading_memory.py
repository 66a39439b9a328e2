"""Memory of four processes that load a model of a billion numbers at ZeRO-3: none of them ever holds more than its share of it.

It needs 7 GB of memory, 2.2 GB of disk, and minutes.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from apprentice.models.attention.backend_choice import PackedCompute
from apprentice.models.loading import load_model
from apprentice.recipe import Training
from apprentice.train.engine.collectives import Collectives
from apprentice.train.engine.model_splitter import create_splitter
from tests.support.process_group import join_group

WORKERS, CPU, FILES = 4, torch.device("cpu"), 6


def write_model(folder: Path) -> dict[str, int]:
    """Writes random weights of 1.1 billion numbers in bfloat16, file by file; gives the bytes of all, and of the largest tensor."""
    config = LlamaConfig(
        vocab_size=32_000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in LlamaForCausalLM(config).state_dict().items()}
    names, generator = list(shapes), torch.Generator().manual_seed(1)
    parts = [names[number::FILES] for number in range(FILES)]
    for number, part in enumerate(parts):
        tensors = {name: torch.randn(shapes[name], generator=generator).bfloat16() for name in part}
        save_file(tensors, folder / f"model-{number}.safetensors", {"format": "pt"})
    places = {name: f"model-{number}.safetensors" for number, part in enumerate(parts) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    sizes = [2 * shape.numel() for shape in shapes.values()]
    return {"model": sum(sizes), "largest": max(sizes)}


def anonymous() -> int:
    """Bytes of anonymous memory of this process: what no file is behind."""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return 1024 * int(line.split()[1])
    raise AssertionError("the kernel does not say")


class PeakAnonymous:
    """Looks at this process's anonymous memory every few milliseconds, and keeps the largest."""

    def __init__(self) -> None:
        self.peak, self._done = 0, Event()
        self._thread = Thread(target=self._look)

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.peak = max(self.peak, anonymous())

    def __enter__(self) -> PeakAnonymous:
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._done.set()
        self._thread.join()


def differing(model: Any, folder: Path, rank: int) -> list[str]:
    """Names of the parameters whose part here is not what the file has; the files are mapped, not read into memory."""
    files: dict[str, Any] = {}
    for path in folder.glob("*.safetensors"):
        file: Any = safe_open(path, framework="pt")
        files.update(dict.fromkeys(file.keys(), file))
    wrong = []
    for name, parameter in model.named_parameters():
        size = parameter.ds_tensor.numel()
        if not torch.equal(files[name].get_tensor(name).flatten()[rank * size :][:size], parameter.ds_tensor):
            wrong.append(name)
    return wrong


def process(rank: int, folder: str) -> None:
    join_group(folder, rank, WORKERS)
    collectives, dtype, base = Collectives(), torch.bfloat16, Path(folder) / "model"
    training = Training.model_validate({"workers": WORKERS, "steps": 1, "global_batch": WORKERS, "deepspeed": {"stage": 3}})
    splitter = create_splitter(training, base, four_bit=False, weights=dtype, micro=1, device=CPU, collectives=collectives)
    assert splitter is not None
    collectives.wait()
    empty = anonymous()
    with PeakAnonymous() as memory:
        model = load_model(base, dtype, packed=PackedCompute.on(CPU, dtype), splitter=splitter)
    resident = anonymous()
    result = {"empty": empty, "peak": max(memory.peak, resident), "held": resident, "bytes_read": splitter.bytes_read}
    results = collectives.gather(
        result | {"wrong": differing(model, base, rank), "numbers": sum(p.ds_numel for p in model.parameters())}
    )
    if rank == 0:
        (Path(folder) / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.long
def test_no_process_ever_holds_more_than_its_share(tmp_path: Path) -> None:
    sizes = write_model(tmp_path / "model")
    os.environ["OMP_NUM_THREADS"] = "1"
    try:
        torch.multiprocessing.spawn(process, (str(tmp_path),), nprocs=WORKERS)
    finally:
        for file in (tmp_path / "model").glob("*.safetensors"):
            file.unlink()
    results = json.loads((tmp_path / "results.json").read_text())
    print(json.dumps(sizes | {"results": results}))
    for result in results:
        assert result["numbers"] >= 1e9
        assert result["wrong"] == []
        share = sizes["model"] / WORKERS
        assert share <= result["held"] - result["empty"] <= result["peak"] - result["empty"]
        assert result["peak"] < 1.1 * (share + sizes["largest"] + result["empty"])
    assert sum(result["bytes_read"] for result in results) == sizes["model"]
