"""Every error a user can meet, with the exit code the command line gives it.

    ApprenticeError            the user can mend it: one sentence, exit code 1, no traceback
    ├── RecipeError            the recipe: unknown key, wrong value, keys that contradict each other
    ├── TaskError              a task file or one of its templates
    │   └── RowError           one row cannot be rendered by one template (counted, not fatal by itself)
    ├── DataError              a source: missing file, missing column, too many bad rows
    ├── ModelError             a base model or a model folder that cannot be found or loaded
    ├── ContractError          the prompt contract is missing or cannot be reproduced
    │   └── ChatTemplateError    a chat template cannot render some messages (of a row: counted, not fatal by itself)
    ├── RunError               the run folder: another identity, damaged checkpoint, nothing to resume
    ├── ResourcesError         the machine or cluster has less than the recipe asks for
    ├── TrainingError          training stopped: NaN loss, workers that keep dying
    ├── EvaluationError        nothing to score, or scores that cannot be made
    ├── ServingError           the endpoint: port in use, engine that does not fit the model
    └── StorageError           a path that cannot be read or written
        └── MissingError       the store answered, and nothing lies there

Each message states the fact, the reason and the remedy. Anything else that escapes is our fault (exit code 3).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


class ApprenticeError(Exception):
    """Base of all errors that the user can mend."""


class RecipeError(ApprenticeError):
    """The recipe is wrong."""


class TaskError(ApprenticeError):
    """A task file, or a template in it, is wrong."""


class RowError(TaskError):
    """A row that a template cannot render; `reason` is the short word it is counted under."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason

    def __reduce__(self) -> tuple[type[RowError], tuple[str, str]]:
        return type(self), (self.reason, str(self))


class DataError(ApprenticeError):
    """A source of rows is missing or unusable."""


class ModelError(ApprenticeError):
    """A model cannot be found or loaded."""


class ContractError(ApprenticeError):
    """The prompt contract is missing, or cannot be reproduced here."""


class ChatTemplateError(ContractError):
    """A chat template cannot render some messages."""


class RunError(ApprenticeError):
    """The run folder does not allow what was asked."""


class ResourcesError(ApprenticeError):
    """The machine or cluster has less than the recipe asks for."""


class TrainingError(ApprenticeError):
    """Training stopped and cannot go on by itself."""


class EvaluationError(ApprenticeError):
    """Scoring is impossible as asked."""


class ServingError(ApprenticeError):
    """The endpoint cannot start as asked."""


class StorageError(ApprenticeError):
    """A path cannot be read or written."""


class MissingError(StorageError):
    """Nothing lies at a path."""


def causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and all that it carries as causes, Ray's ways to carry them included; each one once, the nearest first."""
    seen: set[int] = set()
    waiting = [error]
    while waiting:
        current = waiting.pop(0)
        if id(current) in seen:
            continue
        seen.add(id(current))
        yield current
        inner = [
            getattr(current, name, None)
            for name in ("cause", "_base_exc", "base_exc", "controller_failure", "health_check_failure")
        ]
        inner += [*getattr(current, "worker_failures", {}).values(), current.__cause__, current.__context__]
        waiting += [candidate for candidate in inner if isinstance(candidate, BaseException)]


def full_disk(error: BaseException) -> str | None:
    """The sentence for an error that comes of a full disk, wherever it was met; None for any other."""
    for cause in causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {cause.filename}" if cause.filename else ""
            return f"no room is left on the disk{where}; make room and give the same command again: a run goes on where it was."
    return None


# pydantic's type of an error → what it says in the words of a YAML file.
_NEEDED = {
    "tuple_type": "a list is needed, as in [a, b]",
    "list_type": "a list is needed, as in [a, b]",
    "dict_type": "a block of keys is needed",
    "model_type": "a block of keys is needed",
    "model_attributes_type": "a block of keys is needed",
    "string_type": "a text is needed; put it in quotes",
    "int_type": "a whole number is needed",
    "int_parsing": "a whole number is needed",
    "int_from_float": "a whole number is needed",
    "float_type": "a number is needed",
    "float_parsing": "a number is needed",
    "bool_type": "true or false is needed",
    "bool_parsing": "true or false is needed",
    "missing": "this key is needed, and missing",
}


def needed(kind: str, message: str) -> str:
    """What a value that pydantic refused should be: its error's `kind` and `message` in plain words, without a full stop."""
    said = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return _NEEDED.get(kind, said.replace("Input should be", "it must be"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest known name, or an empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
