"""Subjects of an evaluation: the models or endpoints that are scored, their prompt format, limits and cache fingerprint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apprentice.data.corpus import Corpus
from apprentice.data.encoding.prompt_contract import layout_beside, layout_of
from apprentice.data.encoding.prompt_format import Layout
from apprentice.errors import EvaluationError
from apprentice.evaluate.scoring import majority_baseline as majority
from apprentice.evaluate.scoring.endpoint import EndpointAddress, weights_at
from apprentice.model_pool.answer_settings import AnswerSettings, TokenLimits
from apprentice.model_pool.engine_choice import OWN_ENGINE, EngineChoice, choose_pool_engine
from apprentice.models.loading import resolve_dtype
from apprentice.pretrained.architecture import RELATIVE_POSITIONS, model_config
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.contract import read_contract, weights_sha256

PromptKey = tuple[Any, ...]  # equal where questions have the same token ids


@dataclass(frozen=True)
class Subject:
    """Model that is scored: its folder, and the numbers of exemplars (`shots`) that each question is asked with.

    If there is an `endpoint`, it answers instead, and the folder only determines tokenizer and prompt format.
    """

    name: str
    folder: Path
    shots: tuple[int, ...] = (0,)
    endpoint: EndpointAddress | None = None


@dataclass(frozen=True)
class SubjectSettings:
    """Settings of asking a subject: prompt format, limits, and a fingerprint of all that shapes its answers besides the question.

    Answers are cached under `fingerprint`; it is None for an endpoint that does not report its weights, whose answers are not
    cached. `weights` is the SHA-256 of the weights, if known; `dtype` the dtype of a local model, `engine` what decodes it.
    """

    answer_settings: AnswerSettings
    limits: TokenLimits
    fingerprint: str | None
    weights: str | None = None
    dtype: str | None = None
    engine: EngineChoice = OWN_ENGINE

    @property
    def prompt_key(self) -> PromptKey:
        """Key that is equal for subjects whose questions have the same token ids."""
        return *prompt_format_key(self.answer_settings.layout), self.limits


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Raises `EvaluationError` unless there are subjects, each with a unique name, not `majority`, and some `shots`."""
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) < len(names) or majority.NAME in names or any(not subject.shots for subject in subjects):
        raise EvaluationError(
            f"subjects {names}: each needs a name of its own, other than {majority.NAME!r}, and at least one number of shots."
        )


def make_subject_settings(subject: Subject, recipe: Recipe, corpus: Corpus, *, on_gpu: bool = False) -> SubjectSettings:
    """Prompt format and limits of a subject: from the folder's prompt contract, or for a bare model from the recipe.

    The recipe's `model.dtype` must be the dtype of the workers, because `auto` would be resolved for the calling machine. `on_gpu`
    says whether they have GPUs. Raises `ModelError`, and `ServingError` where the model cannot be split as the recipe asks.
    """
    if read_contract(subject.folder) is not None:
        layout = layout_beside(subject.folder)
    elif subject.folder == corpus.layout.tokenizer.folder:
        layout = corpus.layout
    else:
        layout = layout_of(recipe, Tokenizer(subject.folder), corpus.layout.version)
    answer_settings, limits = make_answer_settings(recipe, layout), make_token_limits(recipe, subject.folder)
    if subject.endpoint is None:
        contract = read_contract(subject.folder)
        sha = contract.weights_sha256 if contract is not None else weights_sha256(subject.folder)
        dtype = str(resolve_dtype(recipe.model.dtype))
        engine = choose_pool_engine(recipe.serving, subject.folder, on_gpu=on_gpu)
        # The engines' sums differ in their last digits. Answers of our own were cached before there was another.
        fingerprint = _fingerprint([sha, dtype, *(["vllm"] if engine.name == "vllm" else [])], answer_settings)
        return SubjectSettings(answer_settings, limits, fingerprint, sha, dtype.removeprefix("torch."), engine)
    served = weights_at(subject.endpoint)
    if served is None:
        return SubjectSettings(answer_settings, limits, None)
    weights = [subject.endpoint.url, subject.endpoint.model, *served]
    return SubjectSettings(answer_settings, limits, _fingerprint(weights, answer_settings), served[0])


def make_answer_settings(recipe: Recipe, layout: Layout) -> AnswerSettings:
    """What decides an answer besides weights and question: layout, reply length, and whether choices are ranked against a prior."""
    return AnswerSettings(layout, recipe.evaluation.max_new_tokens, priors=recipe.evaluation.rank_by == "pmi")


def make_token_limits(recipe: Recipe, folder: Path) -> TokenLimits:
    """Limits on tokens for the model in `folder`; models with relative positions have no limit of context."""
    config = model_config(folder)
    context = config.get("max_position_embeddings") or config.get("n_positions")
    if config.get("model_type") in RELATIVE_POSITIONS:
        context = None
    return TokenLimits(recipe.data.max_length, recipe.evaluation.max_new_tokens, context)


def _fingerprint(weights: list[str | None], answer_settings: AnswerSettings) -> str:
    """SHA-256 of weights and settings of answering: where it is equal, equal questions get equal answers."""
    shape = [
        *prompt_format_key(answer_settings.layout),
        answer_settings.layout.stop_ids,
        answer_settings.reply,
        answer_settings.priors,
    ]
    return hashlib.sha256(json.dumps([weights, shape], default=str).encode()).hexdigest()


def prompt_format_key(layout: Layout) -> tuple[Any, ...]:
    """Key that is equal for prompt formats that make the same token ids of the same texts."""
    same = layout.name, layout.system, layout.date, layout.tokenizer.fingerprint, layout.tokenizer.chat_template
    new = (layout.version, layout.control_tokens) if layout.version > 1 else ()
    return *same, *new, *([layout.day] if layout.day is not None else [])


def subject_entry(subject: Subject, subject_settings: SubjectSettings) -> dict[str, Any]:
    """Entry of a subject in the report (`report_schema.SubjectEntry`)."""
    contract = read_contract(subject.folder)
    return {
        "name": subject.name,
        "shots": list(subject.shots),
        "folder": str(subject.folder) if subject.endpoint is None else f"{subject.endpoint.url} ({subject.endpoint.model})",
        "layout": subject_settings.answer_settings.layout.name,
        "contract": "its own" if contract else "the recipe's",
        "weights_sha256": subject_settings.weights,
        "dtype": subject_settings.dtype,
        "prompt_tokens": subject_settings.limits.prompt,
    }
