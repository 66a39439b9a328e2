"""All errors that are shown to users, as one sentence each.

    ApprenticeError            the user can mend it: one sentence, exit code 1, no traceback
    ├── RecipeError            the recipe: unknown key, wrong value, keys that contradict each other
    ├── TaskError              a task file or one of its templates
    │   └── RowError           one row cannot be rendered by one template (counted, not fatal by itself)
    ├── DataError              a source: missing file, missing column, too many bad rows
    ├── ModelError             a base model or a model folder that cannot be found or loaded
    ├── ContractError          the prompt contract is missing, or its golden prompts cannot be reproduced
    │   └── ChatTemplateError    a chat template cannot render some messages (of a row: counted, not fatal by itself)
    ├── RunError               the run folder: another identity, damaged checkpoint, nothing to resume
    ├── ResourcesError         the machine or cluster has less than the recipe asks for
    ├── TrainingError          training stopped: NaN loss, workers that keep dying
    ├── EvaluationError        nothing to score, or scores that cannot be made
    ├── ServingError           the endpoint: port in use, engine that does not fit the model
    └── StorageError           a path that cannot be read or written
        ├── MissingError       the store answered, and nothing lies there
        └── DamagedError       the store answered with other bytes than were written

Each message states the fact, the reason and the remedy. Any other exception that reaches the command line is a bug (exit code 3).
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator
from difflib import get_close_matches


class ApprenticeError(Exception):
    """Base of all errors that the user can fix."""


class RecipeError(ApprenticeError):
    """The recipe has an unknown key, a wrong value, or keys that contradict each other."""


class TaskError(ApprenticeError):
    """A task file, or a template in it, is invalid."""


class RowError(TaskError):
    """A row that a template cannot render; `reason` is the word under which it is counted."""

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
    """The prompt contract is missing, or the golden prompts in it cannot be reproduced."""


class ChatTemplateError(ContractError):
    """A chat template cannot render some messages."""


class RunError(ApprenticeError):
    """The run folder does not allow the command."""


class ResourcesError(ApprenticeError):
    """The machine or cluster has less than the recipe asks for."""


class TrainingError(ApprenticeError):
    """Training stopped and cannot resume by itself."""


class EvaluationError(ApprenticeError):
    """Scoring is impossible with these settings."""


class ServingError(ApprenticeError):
    """The endpoint cannot start with these settings."""


class StorageError(ApprenticeError):
    """A path cannot be read or written."""


class MissingError(StorageError):
    """A path does not exist."""


class DamagedError(StorageError):
    """A file does not hold the bytes that were written."""


def all_causes(error: BaseException) -> Iterator[BaseException]:
    """`error` and all its causes, breadth first and each once: Python's chaining, and the attributes in which Ray keeps them."""
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


def full_disk_sentence(error: BaseException) -> str | None:
    """The message for an error that a full disk caused, directly or as one of its causes; None for any other error."""
    for cause in all_causes(error):
        if isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f" for {cause.filename}" if cause.filename else ""
            return f"no room is left on the disk{where}; make room and give the same command again: a run goes on where it was."
    return None


# Type of a pydantic error → its message in terms of a YAML file.
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


def requirement_of(kind: str, message: str) -> str:
    """A pydantic error in plain words: the requirement that the value does not meet, without a full stop.

    `kind` and `message` are the error's `type` and `msg`.
    """
    said = message.removeprefix("Value error, ").removeprefix("Assertion failed, ")
    return _NEEDED.get(kind, said.replace("Input should be", "it must be"))


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """` Did you mean 'x'?` with the nearest known name, or an empty string."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
