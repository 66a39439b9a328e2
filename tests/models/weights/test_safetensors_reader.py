"""Ranges of tensors in safetensors files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from apprentice.errors import ModelError
from apprentice.models.weights import safetensors_reader
from apprentice.models.weights.safetensors_reader import SafetensorsReader, weight_files


@pytest.mark.parametrize("dtype", safetensors_reader._DTYPES.values(), ids=str)
def test_a_range_is_what_safetensors_reads(tmp_path: Path, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_reader, "PIECE_BYTES", 24)  # so that a range takes several reads
    values = (torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 50).to(dtype)
    save_file({"a": torch.ones(3, dtype=torch.float32), "b": values}, tmp_path / "some.safetensors")
    reader = SafetensorsReader([tmp_path / "some.safetensors"])
    assert {name: (entry.dtype, entry.shape) for name, entry in reader.entries.items()} == {
        "a": (torch.float32, (3,)),
        "b": (dtype, (7, 5)),
    }
    out = torch.zeros(20, dtype=dtype)
    reader.read_into("b", 11, out)
    assert torch.equal(out, values.flatten()[11:31])
    assert reader.bytes_read == 20 * dtype.itemsize
    assert torch.equal(reader.read("b"), values)
    assert reader.bytes_read == 55 * dtype.itemsize
    reader.read_into("b", 35, torch.zeros(0, dtype=dtype))
    assert reader.bytes_read == 55 * dtype.itemsize


def test_numbers_come_in_the_format_of_where_they_go(tmp_path: Path) -> None:
    values = torch.randn(10)
    save_file({"a": values}, tmp_path / "some.safetensors")
    out = torch.zeros(10, dtype=torch.bfloat16)
    SafetensorsReader([tmp_path / "some.safetensors"]).read_into("a", 0, out)
    assert torch.equal(out, values.bfloat16())


def test_the_files_that_transformers_takes(tmp_path: Path) -> None:
    assert weight_files(tmp_path) == []
    for name in ("model-2.safetensors", "model-1.safetensors", "adapter_model.safetensors"):
        save_file({name: torch.zeros(1)}, tmp_path / name)
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a": "model-2.safetensors", "b": "model-1.safetensors", "c": "model-2.safetensors"}})
    )
    assert [file.name for file in weight_files(tmp_path)] == ["model-1.safetensors", "model-2.safetensors"]
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert weight_files(tmp_path) == [tmp_path / "model.safetensors"]
    (tmp_path / "model.safetensors").unlink()
    index.write_text("[]")
    with pytest.raises(ModelError, match=r"index.json cannot be read .*; fetch or export the model again"):
        weight_files(tmp_path)


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"

    def refused(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(ModelError) as caught:
            SafetensorsReader([file]).read("a")
        return str(caught.value)

    save_file({"a": torch.zeros(100)}, file)
    whole = file.read_bytes()
    assert "ends before 'a'" in refused(whole[:-1])
    assert "is no safetensors file" in refused(whole[:5])
    assert "is no safetensors file" in refused(b"x" * 400)
    header = json.dumps({"a": {"dtype": "F4", "shape": [1], "data_offsets": [0, 1]}}).encode()
    assert refused(struct.pack("<Q", len(header)) + header + b"0").endswith("fetch or export the model again.")
    with pytest.raises(ModelError, match="cannot be read"):
        SafetensorsReader([tmp_path / "nowhere.safetensors"])


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(100)}, file)
    reader = SafetensorsReader([file])
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(ModelError, match="end early"):
        reader.read("a")
