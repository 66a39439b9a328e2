"""A model whose weights are streamed is written as `save_pretrained` writes it, to the byte, and holds one parameter at a time."""

from __future__ import annotations

import hashlib
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import modeling_utils

from apprentice.models.loading import load_model
from apprentice.models.merge import merge_streamed
from apprentice.models.tuning.methods import TUNING_METHODS
from apprentice.models.weights.streamed_weights import StreamedWeights
from apprentice.models.weights.streamed_writer import write_model
from apprentice.recipe import Tuning
from apprentice.storage import Folder
from tests.models.architectures import CAUSAL, MIXING, SEQ2SEQ, made
from tests.models.weights.test_split_model import MIXTURES


def files_of(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def write_streamed(base: Path, target: Path, dtype: torch.dtype) -> StreamedWeights:
    weights = StreamedWeights(least=8)
    model = load_model(base, torch.float32, splitter=weights)
    weights.cast(model, dtype)
    target.mkdir()
    digest = hashlib.sha256()
    write_model(model, weights, target, Folder.at(target), digest)
    expected = b"".join(file.read_bytes() for file in sorted(target.glob("*.safetensors")))
    assert digest.hexdigest() == hashlib.sha256(expected).hexdigest()
    return weights


@pytest.mark.parametrize("name", [*CAUSAL, *MIXING, *SEQ2SEQ, *MIXTURES])
def test_the_files_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    (MIXTURES[name]() if name in MIXTURES else made(name)).save_pretrained(tmp_path / "base")
    load_model(tmp_path / "base", torch.float32).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    write_streamed(tmp_path / "base", tmp_path / "streamed", torch.bfloat16)
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")


def test_buffers_that_no_file_holds_keep_their_number_format(tmp_path: Path) -> None:
    """As where the model is loaded again; else its scores before it is written would be those of other rotary positions."""
    torch.manual_seed(0)
    made("llama").save_pretrained(tmp_path / "base")
    weights = StreamedWeights()
    model = load_model(tmp_path / "base", torch.float32, splitter=weights)
    weights.cast(model, torch.bfloat16)
    loaded = dict(load_model(tmp_path / "base", torch.bfloat16).named_buffers())
    assert {name: buffer.dtype for name, buffer in model.named_buffers()} == {name: one.dtype for name, one in loaded.items()}
    assert torch.float32 in {buffer.dtype for buffer in loaded.values()}


def test_several_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    MIXTURES["mixtral"]().save_pretrained(tmp_path / "base")
    split = modeling_utils.split_torch_state_dict_into_shards

    def split_small(state: Any, filename_pattern: str, max_shard_size: str) -> Any:
        return split(state, filename_pattern=filename_pattern, max_shard_size="6KB")

    monkeypatch.setattr(modeling_utils, "split_torch_state_dict_into_shards", split_small)
    load_model(tmp_path / "base", torch.float32).save_pretrained(tmp_path / "whole")
    write_streamed(tmp_path / "base", tmp_path / "streamed", torch.float32)
    names = files_of(tmp_path / "whole")
    assert sum(name.startswith("model-") for name in names) > 3
    assert "model.safetensors.index.json" in names
    assert load_model(tmp_path / "streamed", torch.float32).num_parameters() > 0
    whole, streamed = (
        {key: value for file in (tmp_path / place).glob("*.safetensors") for key, value in load_file(file).items()}
        for place in ("whole", "streamed")
    )
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(value, streamed[key]) for key, value in whole.items())


class AliveBytes:
    """The most bytes of tensors that were alive at once, of those that it is told."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.known: set[int] = set()

    def __call__(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage.data_ptr() in self.known:
            return
        self.known.add(storage.data_ptr())
        self.now += storage.nbytes()
        self.most = max(self.most, self.now)
        weakref.finalize(tensor, self._forget, storage.data_ptr(), storage.nbytes())

    def _forget(self, place: int, nbytes: int) -> None:
        self.known.discard(place)
        self.now -= nbytes


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize(
    ("name", "changes"),
    [("llama", {}), ("llama", {"dora": True, "rslora": True}), ("gpt2", {}), ("t5", {}), ("mixtral", {"experts": True})],
)
def test_lora_is_merged_as_peft_does_and_one_tensor_is_in_memory(name: str, changes: dict[str, bool], tmp_path: Path) -> None:
    torch.manual_seed(0)
    (MIXTURES[name]() if name in MIXTURES else made(name)).save_pretrained(tmp_path / "base")
    tuning = Tuning.model_validate({"method": "lora", "rank": 4} | changes)
    alive = AliveBytes()
    weights = StreamedWeights(least=8, tell_memory=alive)
    whole, streamed = (
        TUNING_METHODS["lora"].wrap(load_model(tmp_path / "base", torch.float32, splitter=splitter), tuning, 3)
        for splitter in (None, weights)
    )
    generator = torch.Generator().manual_seed(1)
    for one, other in zip(whole.parameters(), streamed.parameters(), strict=True):
        if one.requires_grad:
            one.data = other.data = torch.rand(one.shape, generator=generator)
    ids = torch.tensor([[3, 4, 5, 6]])
    inputs = {"input_ids": ids} | ({"decoder_input_ids": ids} if name == "t5" else {})
    with torch.no_grad(), weights.gather_on_use(streamed):
        assert torch.equal(streamed(**inputs).logits, whole(**inputs).logits)
    largest = max(parameter.numel() for parameter in whole.parameters())
    of_module = max(sum(p.numel() for p in module.parameters(recurse=False)) for module in whole.modules())
    assert 0 < alive.most <= 4 * of_module
    alive.most = alive.now
    assert alive.now == 0
    merge = TUNING_METHODS["lora"].merge
    assert merge is not None
    merge(whole, torch.bfloat16).to(torch.bfloat16).save_pretrained(tmp_path / "whole")
    plain = merge_streamed(streamed, weights)
    weights.cast(plain, torch.bfloat16)
    (tmp_path / "streamed").mkdir()
    write_model(plain, weights, tmp_path / "streamed", Folder.at(tmp_path / "streamed"), hashlib.sha256())
    assert files_of(tmp_path / "streamed") == files_of(tmp_path / "whole")
    assert 0 < alive.most <= 6 * largest  # read in float32, and cast


def test_a_weight_that_is_read_outside_of_its_module_shows(tmp_path: Path) -> None:
    made("llama").save_pretrained(tmp_path)
    weights = StreamedWeights(least=8)
    model: Any = load_model(tmp_path, torch.float32, splitter=weights)
    with torch.no_grad(), weights.gather_on_use(model):
        assert model(input_ids=torch.tensor([[1, 2]])).logits.isfinite().all()
        assert nn.functional.linear(torch.ones(1, 64), model.lm_head.weight).isnan().all()
