"""Exports of a run in every format, each with a certificate that was measured on the run's validation rows."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from apprentice import cli, pipeline
from apprentice.data.encoding.prompt_contract import layout_of, make_contract
from apprentice.data.stream import make_corpus
from apprentice.errors import ModelError, RunError
from apprentice.models.loading import load_model
from apprentice.models.merge import merge_adapter
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import load_recipe
from apprentice.run.contract import read_contract, weights_sha256
from apprentice.run.equivalence import EquivalenceCertificate, mean_with_interval
from apprentice.run.folder import Run, open_run
from apprentice.storage import Folder
from tests.models.adapters import random_lora
from tests.support.recipes import tiny_recipe


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """As training leaves one: its index, an adapter, and the model that it is merged into."""
    recipe = load_recipe(tiny_recipe(tmp_path_factory.mktemp("runs"), tiny_model))
    opened = open_run(recipe)
    make_corpus(recipe, opened, parallel=False)
    random_lora(load_model(tiny_model, torch.float32), opened.adapter.local, 7)
    config = opened.adapter.local / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tiny_model)}))
    merge_adapter(opened.adapter.local, opened.model.local)
    for folder in (opened.model.local, opened.adapter.local):
        base_sha256 = None if folder.name == "model" else weights_sha256(tiny_model)
        make_contract(recipe, layout_of(recipe, Tokenizer(tiny_model)), folder, run=recipe.name, base_sha256=base_sha256).write(
            folder
        )
    return opened


def export(run: Run, folder: Path, form: str, tolerance: float = 0.05) -> EquivalenceCertificate:
    options = pipeline.ExportOptions(format=form, tolerance=tolerance)
    result = pipeline.export_run(str(run.folder), str(folder), options=options)
    certificate = EquivalenceCertificate.model_validate_json((folder / "equivalence.json").read_text())
    assert result["equivalence"] == certificate.model_dump(mode="json")
    assert certificate.sentence() in (folder / "README.md").read_text()
    contract, of_run = read_contract(folder), read_contract(run.model)
    assert contract is not None
    assert of_run is not None
    assert of_run.base.startswith("/")
    assert (contract.base, contract.ancestors) == (Path(of_run.base).name, tuple(Path(base).name for base in of_run.ancestors))
    assert contract.golden == of_run.golden
    return certificate


def test_every_format_is_measured(run: Run, tmp_path: Path) -> None:
    contract = read_contract(run.model)
    assert contract is not None
    for form, name, most in (("adapter", "adapter_model.safetensors", 1e-6), ("gguf:q8_0", "tiny-q8_0.gguf", 0.05)):
        certificate = export(run, tmp_path / form, form)
        assert (certificate.format, certificate.reference_sha256) == (form, contract.weights_sha256)
        assert list(certificate.files) == [name]
        assert (certificate.rows_from, certificate.rows > 4, certificate.tokens > certificate.rows) == ("validation", True, True)
        assert certificate.mean_kl.low <= certificate.mean_kl.value <= certificate.mean_kl.high
        assert abs(certificate.mean_kl.value) < most
        assert (certificate.mean_kl.value > 1e-7) is (form != "adapter")
    other = read_contract(tmp_path / "gguf:q8_0")
    assert other is not None
    assert (other.golden, other.chat_template) == (contract.golden, Tokenizer(run.model.local).chat_template)
    certificate = export(run, tmp_path / "safetensors", "safetensors")
    assert (certificate.read_by, certificate.mean_kl.value) == ("bytes", 0.0)


def test_beyond_the_tolerance_nothing_is_written(run: Run, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="as gguf:q8_0 the model is not the run's any more: the mean divergence is"):
        export(run, tmp_path / "out", "gguf:q8_0", tolerance=1e-9)
    assert list(tmp_path.iterdir()) == []


def test_another_adapter_shows(run: Run, tmp_path: Path, tiny_model: Path) -> None:
    """The certificate is of the files, and not of what they should be."""
    copy = Run(Folder.at(tmp_path / "copy"))
    shutil.copytree(run.folder.local, copy.folder.local)
    shutil.rmtree(copy.adapter.local)
    random_lora(load_model(tiny_model, torch.float32), copy.adapter.local, 8)
    with pytest.raises(ModelError, match="is not the run's any more"):
        export(copy, tmp_path / "out", "adapter", tolerance=1e-4)
    shutil.rmtree(copy.adapter.local)
    with pytest.raises(RunError, match=r"has no adapter: tuning\.method lora"):
        export(copy, tmp_path / "out", "adapter")


def test_what_is_no_format(run: Run, tmp_path: Path) -> None:
    for form in ("onnx", "safetensors:q8_0"):
        with pytest.raises(ModelError, match="is no format of an export"):
            export(run, tmp_path / "out", form)
    with pytest.raises(ModelError, match="choose f32, f16, bf16, q8_0"):
        export(run, tmp_path / "out", "gguf:q2_k")


def test_an_interval_holds_its_mean_and_depends_on_the_rows_alone() -> None:
    one, other = (mean_with_interval([1.0, 2.0, 9.0], [1, 2, 3]) for _ in range(2))
    assert one == other
    assert (one.value, one.low <= 1.0, one.high >= 3.0) == (2.0, True, True)
    assert mean_with_interval([4.0], [2]).low == 2.0


def test_the_command(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["apprentice", "export", str(run.folder), str(tmp_path / "out"), "--format", "gguf:f16", "--json"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    result = json.loads(capsys.readouterr().out)
    assert (result["format"], result["equivalence"]["read_by"]) == ("gguf:f16", "transformers (gguf_file)")
