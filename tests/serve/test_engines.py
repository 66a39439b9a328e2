"""What is refused before an engine starts."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from apprentice.errors import ServingError
from apprentice.recipe import Serving
from apprentice.serve.deployment import check

WITH_VLLM = Serving(port=0, engine="vllm")


def test_vllm_decodes_no_sequence_to_sequence_model(t5_model: Path) -> None:
    with pytest.raises(ServingError, match=r"engine vllm decodes causal models only, and .* is a sequence-to-sequence model; use"):
        check(t5_model, WITH_VLLM)
    check(t5_model, Serving(port=0))


def test_vllm_would_leave_out_what_lies_beside_the_weights(chat_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(chat_model, folder)
    (folder / "adapter").mkdir()
    with pytest.raises(ServingError, match=r"has an adapter beside its weights .* vLLM would leave it out"):
        check(folder, WITH_VLLM)


def test_vllm_is_an_extra(chat_model: Path) -> None:
    if importlib.util.find_spec("vllm") is not None:
        check(chat_model, WITH_VLLM)
        return
    with pytest.raises(ServingError, match=r"needs the package vllm, which is not installed; pip install 'apprentice\[vllm\]'"):
        check(chat_model, WITH_VLLM)
