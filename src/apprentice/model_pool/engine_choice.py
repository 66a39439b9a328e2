"""Choice of the engine that decodes a model: vLLM, or our own over transformers. No engine is imported here."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Literal, NamedTuple

from apprentice.errors import ServingError
from apprentice.pretrained.architecture import family_of, gives_rewards, model_config
from apprentice.recipe import Serving
from apprentice.run.identity import ADAPTER

EngineName = Literal["transformers", "vllm"]


class EngineChoice(NamedTuple):
    """An engine, and the reason for it, to follow its name in a sentence ("vllm: …")."""

    name: EngineName
    reason: str

    def __str__(self) -> str:
        return f"engine {self.name}: {self.reason}"


OWN_ENGINE = EngineChoice("transformers", "the model runs on CPUs")


def check_decodes(name: str, folder: Path) -> None:
    """Raises `ServingError` where the engine `name`, installed here or not, cannot decode the model in `folder`."""
    if name == "vllm" and family_of(folder) == "seq2seq":
        raise ServingError(
            f"serving.engine vllm decodes causal models only, and {folder} is a sequence-to-sequence model; use transformers."
        )


def check_engine(name: str, folder: Path, tensor_parallel: int = 1) -> None:
    """Raises `ServingError` where the engine `name` is not installed, or cannot decode the model in `folder`.

    `name` may be `auto`, which is refused only where `tensor_parallel` needs an engine that it cannot take.
    """
    if name == "vllm" or tensor_parallel > 1:
        if name == "transformers":
            raise ServingError(
                f"serving.tensor_parallel {tensor_parallel} is vLLM's, and serving.engine transformers holds a model on one device;"
                " use serving.engine vllm, or leave tensor_parallel out."
            )
        _check_vllm(folder)
        _check_heads(folder, tensor_parallel)


def choose_engine(serving: Serving, folder: Path, *, on_gpu: bool) -> EngineChoice:
    """The engine for the model in `folder`: the one that `serving.engine` names, or for `auto` vLLM on GPUs where it can.

    Raises `ServingError` as `check_engine` does.
    """
    check_engine(serving.engine, folder, serving.tensor_parallel)
    if serving.engine == "vllm" or serving.engine == "transformers":
        return EngineChoice(serving.engine, f"serving.engine {serving.engine}")
    if serving.tensor_parallel > 1:
        if not on_gpu:
            raise ServingError(
                f"serving.tensor_parallel {serving.tensor_parallel} asks for GPUs, and there are none here; leave it out, or set"
                " serving.engine vllm to split the model over processes on CPUs."
            )
        return EngineChoice("vllm", f"serving.tensor_parallel {serving.tensor_parallel}")
    if not on_gpu:
        return OWN_ENGINE
    try:
        _check_vllm(folder)
    except ServingError as error:
        return EngineChoice("transformers", str(error).partition(";")[0])
    return EngineChoice("vllm", "a causal model on a GPU, and vLLM is installed")


def choose_pool_engine(serving: Serving, folder: Path, *, on_gpu: bool) -> EngineChoice:
    """The engine for the workers of `evaluate` and `predict`, chosen as `choose_engine` does.

    Our own takes over where a named vLLM cannot answer, unless the model is to be split. Raises `ServingError` where it is.
    """
    if gives_rewards(folder):
        return EngineChoice("transformers", "a reward model writes nothing")
    try:
        return choose_engine(serving, folder, on_gpu=on_gpu)
    except ServingError as error:
        if serving.tensor_parallel > 1:
            raise
        return EngineChoice("transformers", str(error).partition(";")[0])


def _check_vllm(folder: Path) -> None:
    check_decodes("vllm", folder)
    if (folder / ADAPTER).is_dir():
        raise ServingError(
            f"{folder} has an adapter beside its weights that cannot be merged into them, and vLLM would leave it out; use"
            " serving.engine transformers."
        )
    if importlib.util.find_spec("vllm") is None:
        raise ServingError(
            "serving.engine vllm needs the package vllm, which is not installed; pip install 'apprentice[vllm]', or use"
            " serving.engine transformers."
        )


def _check_heads(folder: Path, tensor_parallel: int) -> None:
    config = model_config(folder)
    inner = config.get("text_config") or config
    heads = inner.get("num_attention_heads") or inner.get("n_head") or tensor_parallel
    if heads % tensor_parallel:
        parts = [str(count) for count in range(2, heads + 1) if heads % count == 0]
        raise ServingError(
            f"serving.tensor_parallel {tensor_parallel} does not divide the {heads} attention heads of {folder}, which are split"
            f" evenly; use {', '.join(parts[:6])}."
        )
