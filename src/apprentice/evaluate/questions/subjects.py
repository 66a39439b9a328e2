"""Who is scored: a model's folder or an endpoint that serves it, how it is spoken to, and what its answers depend on."""

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
from apprentice.evaluate.scoring.endpoint import Endpoint, weights_at
from apprentice.model_pool.limits import Limits, Manner
from apprentice.models.loading import resolve_dtype
from apprentice.pretrained.architecture import RELATIVE_POSITIONS, model_config
from apprentice.pretrained.tokenizer import Tokenizer
from apprentice.recipe import Recipe
from apprentice.run.folder import read_contract, weights_sha256


@dataclass(frozen=True)
class Subject:
    """A model that is scored: its folder, and with how many exemplars each question is asked (once for each number).

    With an `endpoint` that is asked instead, and the folder says only how to phrase questions.
    """

    name: str
    folder: Path
    shots: tuple[int, ...] = (0,)
    endpoint: Endpoint | None = None


@dataclass(frozen=True)
class Spoken:
    """How a subject is spoken to, and the fingerprint of everything that shapes its answers besides the question.

    None: nobody knows what answers there, so no answer is remembered. `weights` is the hash of what answers, where it is known,
    `dtype` the number format that it computes in, of a model here.
    """

    manner: Manner
    limits: Limits
    fingerprint: str | None
    weights: str | None = None
    dtype: str | None = None

    @property
    def phrasing(self) -> tuple[Any, ...]:
        """Equal for subjects whose questions have the same ids."""
        return *identity(self.manner.layout), self.limits


def check_subjects(subjects: Sequence[Subject]) -> None:
    """Raises `EvaluationError` unless every subject has a name of its own and something to be asked."""
    names = [subject.name for subject in subjects]
    if not subjects or len(set(names)) < len(names) or majority.NAME in names or any(not subject.shots for subject in subjects):
        raise EvaluationError(
            f"subjects {names}: each needs a name of its own, other than {majority.NAME!r}, and at least one number of shots."
        )


def spoken_to(subject: Subject, recipe: Recipe, corpus: Corpus) -> Spoken:
    """Layout and limits: from the folder's contract, or for a bare model as the recipe says. Raises `ModelError`.

    The recipe's `model.dtype` is to be what the workers compute in; `auto` would be what suits the machine that asks.
    """
    if read_contract(subject.folder) is not None:
        layout = layout_beside(subject.folder)
    elif subject.folder == corpus.layout.tokenizer.folder:
        layout = corpus.layout
    else:
        layout = layout_of(recipe, Tokenizer(subject.folder), corpus.layout.version)
    manner, limits = manner_of(recipe, layout), limits_of(recipe, subject.folder)
    if subject.endpoint is None:
        contract = read_contract(subject.folder)
        sha = contract.weights_sha256 if contract is not None else weights_sha256(subject.folder)
        dtype = str(resolve_dtype(recipe.model.dtype))
        fingerprint = _fingerprint([sha, dtype], manner)
        return Spoken(manner, limits, fingerprint, sha, dtype.removeprefix("torch."))
    there = weights_at(subject.endpoint)
    if there is None:
        return Spoken(manner, limits, None)
    weights = [subject.endpoint.url, subject.endpoint.model, *there]
    return Spoken(manner, limits, _fingerprint(weights, manner), there[0])


def manner_of(recipe: Recipe, layout: Layout) -> Manner:
    return Manner(layout, recipe.evaluation.max_new_tokens, priors=recipe.evaluation.rank_by == "pmi")


def limits_of(recipe: Recipe, folder: Path) -> Limits:
    """What may be asked of the model in `folder`: of one with places to look up, what its endpoint takes too."""
    config = model_config(folder)
    context = config.get("max_position_embeddings") or config.get("n_positions")
    if config.get("model_type") in RELATIVE_POSITIONS:
        context = None
    return Limits(recipe.data.max_length, recipe.evaluation.max_new_tokens, context)


def _fingerprint(weights: list[str | None], manner: Manner) -> str:
    """Where this is equal, equal questions get equal answers."""
    shape = [*identity(manner.layout), manner.layout.stop_ids, manner.reply, manner.priors]
    return hashlib.sha256(json.dumps([weights, shape], default=str).encode()).hexdigest()


def identity(layout: Layout) -> tuple[Any, ...]:
    """Equal for layouts that make the same ids of the same texts."""
    same = layout.name, layout.system, layout.date, layout.tokenizer.fingerprint, layout.tokenizer.chat_template
    new = (layout.version, layout.control_tokens) if layout.version > 1 else ()
    return *same, *new, *([layout.day] if layout.day is not None else [])


def described(subject: Subject, spoken: Spoken) -> dict[str, Any]:
    """What the report says of a subject."""
    contract = read_contract(subject.folder)
    return {
        "name": subject.name,
        "shots": list(subject.shots),
        "folder": str(subject.folder) if subject.endpoint is None else f"{subject.endpoint.url} ({subject.endpoint.model})",
        "layout": spoken.manner.layout.name,
        "contract": "its own" if contract else "the recipe's",
        "weights_sha256": spoken.weights,
        "dtype": spoken.dtype,
        "prompt_tokens": spoken.limits.prompt,
    }
