"""The engine that writes the replies of on-policy rounds, and the GPUs that each writer reserves for it."""

from __future__ import annotations

from dataclasses import dataclass

from apprentice.errors import ServingError
from apprentice.model_pool.engine_choice import OWN_ENGINE, EngineChoice, choose_engine
from apprentice.pretrained.hub import local_folder
from apprentice.recipe import Recipe


@dataclass(frozen=True)
class WriterEngine:
    """An engine with the reason for it, and the `gpus` of a writer, over which vLLM splits the policy where `is_split`."""

    choice: EngineChoice
    gpus: float
    is_split: bool = False

    @property
    def tensor_parallel(self) -> int:
        """Number of processes that vLLM splits the policy over."""
        return int(self.gpus) if self.is_split else 1


OWN_WRITER = WriterEngine(OWN_ENGINE, 0.0)


def choose_writer_engine(recipe: Recipe) -> WriterEngine:
    """The engine for the writers of `recipe`: as `evaluate` and `predict` choose, and our own where vLLM cannot write.

    A training is not refused for `serving.tensor_parallel`: our own engine writes then with one worker's GPUs.
    """
    serving, gpus = recipe.serving, recipe.training.resources.gpus
    try:
        choice = choose_engine(serving, local_folder(recipe.model.base), on_gpu=gpus > 0) if gpus else OWN_ENGINE
    except ServingError as error:
        choice = EngineChoice("transformers", str(error).partition(";")[0])
    is_split = choice.name == "vllm" and serving.tensor_parallel > 1
    return WriterEngine(choice, float(serving.tensor_parallel) if is_split else gpus, is_split)


def describe_writers(recipe: Recipe, engine: WriterEngine) -> str:
    """One line on who writes the replies of a run."""
    writers = recipe.training.grpo.actors
    whose = f"{writers} writer{'s' if writers > 1 else ''}" + (f" of {engine.gpus:g} GPUs each" if engine.gpus else "")
    return f"replies are written by {whose}, {engine.choice}"
