"""What makes two runs the same: every key of the recipe that shapes learning, by content and never by a path.

Format 2: a task is the hash of its definition, the model in a folder the hash of its files, another run's model the hash of its
weights. Runs of format 1 knew tasks and folders by their paths, and are compared so. Rows are not part of it: the index knows them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from apprentice.errors import TaskError
from apprentice.recipe import RUN, Recipe
from apprentice.storage import Folder
from apprentice.tasks.definition import definition_of
from apprentice.tasks.registry import Entry, Find, find_tasks

# Keys that say where and on how much hardware a run executes, or what happens after it; they do not shape learning.
NOT_IDENTITY = (
    "name",
    "storage",
    "data.root",
    "model.attention",
    "model.trust",
    "training.workers",
    "training.resources",
    "training.micro_batch",
    "training.deepspeed",
    "training.activation_checkpointing",
    "training.checkpoint",
    "training.max_failures",
    "training.hang_timeout_s",
    "training.sample_every_steps",
    "training.sample_instructions",
    "training.tracking",
    "evaluation",
    "serving",
)
# Keys that came later: at their defaults they are left out, so that a run keeps the identity that it had before.
LATER = ("training.objective", "training.dpo", "training.grpo", "data.chat_template", "data.qualities", "data.control_tokens")
# Of what a run folder holds. 1: before the number was kept. 2: other rules of encoding, CSV and identity, for new runs only.
FORMAT = 2
CONTRACT_FILE = "apprentice.json"
GATE_FILE = "gate.json"  # beside the weights: whether they passed their recipe's gate
ADAPTER = "adapter"  # folder beside a model's weights, with what cannot be merged into them
# Of a model's folder: what shapes learning besides the weights. Reports, cards and settings of decoding do not.
_MODEL_FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.py")
_TASK = "data.tasks."  # how the key of a task's definition begins


def identity(recipe: Recipe, version: int = FORMAT, *, anywhere: bool = False, find: Find = find_tasks) -> dict[str, Any]:
    """Dotted key → value, for every key that shapes learning, by the formula of the format `version`.

    `anywhere`: task files that are not on this machine are known by how the recipe names them; otherwise they raise `TaskError`.
    `find` says what an entry of `data.tasks` means.
    """
    keys = flat(recipe.model_dump(mode="json"))
    set_keys = flat(recipe.model_dump(mode="json", exclude_defaults=True))
    kept = {
        key: value for key, value in keys.items() if not _within(key, NOT_IDENTITY) and (key in set_keys or not _within(key, LATER))
    }
    if recipe.data.qualities is not None:  # whole: of equals the first is the best
        kept = {key: value for key, value in kept.items() if not key.startswith("data.qualities.")}
        kept["data.qualities"] = [[name, *one.model_dump(mode="json").values()] for name, one in recipe.data.qualities.items()]
    models = {
        "model.base": recipe.model.base,
        "training.dpo.reference": recipe.training.dpo.reference,
        "training.grpo.reward": recipe.training.grpo.reward,
    }
    named = {key: base for key, base in models.items() if base}
    if version == 1:
        return kept | {key: public_base(base) for key, base in named.items()} | {"data.tasks": _paths(recipe)}
    del kept["data.promptsource"]  # a folder; what was found in it is in the tasks' definitions
    definitions = _definitions(recipe.data.entries, find, anywhere=anywhere)
    tasks = {"data.tasks": list(definitions), **{f"{_TASK}{name}": found for name, found in definitions.items()}}
    return kept | {key: _model(base) for key, base in named.items()} | tasks


def _paths(recipe: Recipe) -> list[Any]:
    """`data.tasks` as runs of format 1 know them."""
    return [
        (entry if entry.islower() or "/" not in entry else Path(entry).name)
        if isinstance(entry, str)
        else entry.model_dump(mode="json", exclude_none=True)
        for entry in recipe.data.tasks
    ]


def _definitions(entries: Sequence[Entry], find: Find, *, anywhere: bool) -> dict[str, str]:
    """Task → the hash of its definition, in the recipe's order."""
    found: dict[str, str] = {}
    for entry in entries:
        try:
            found |= {task.name: definition_of(task)[:16] for task in find(entry, Path.cwd())}
        except TaskError:
            if not anywhere:
                raise
            found[json.dumps(entry, sort_keys=True)] = "not on this machine"
    return found


def _model(base: str) -> str:
    """A model by what it is: a run's by its weights, a folder's by its files; a hub id and a URI are names."""
    if base.startswith(RUN):
        contract = Folder.at(base.removeprefix(RUN)) / "model" / CONTRACT_FILE
        weights = f"@{contract.read_json()['weights_sha256'][:16]}" if contract.exists() else ""
        return f"{public_base(base)}{weights}"
    folder = Path(base).expanduser()
    return f"folder@{model_sha256(folder)[:16]}" if (folder / "config.json").is_file() else base


def model_sha256(folder: Path) -> str:
    """sha256 over the names and the content of the files in a model's folder that shape what it learns, weights among them."""
    weights = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    small = {file for pattern in _MODEL_FILES for file in folder.glob(pattern) if file.is_file()}
    files = [*weights, *sorted(small), *sorted((folder / ADAPTER).glob("*.safetensors"))]
    stats = [file.stat() for file in files]
    return _files_sha256(tuple((str(file), stat.st_size, stat.st_mtime_ns) for file, stat in zip(files, stats, strict=True)))


@lru_cache(maxsize=16)
def _files_sha256(files: tuple[tuple[str, int, int], ...]) -> str:
    with ThreadPoolExecutor(max_workers=8) as pool:
        digests = pool.map(_sha256, [path for path, _, _ in files])
        lines = [f"{Path(path).name} {digest}\n" for (path, _, _), digest in zip(files, digests, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _sha256(path: str) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def differences(recipe: Recipe, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What is not the same in two identities, each in a few words; nothing where they are those of one run."""
    # A key that a later version brought was not written then; at its default it changes nothing.
    written = flat(recipe.model_dump(mode="json", exclude_defaults=True))
    later = {key for key in new.keys() - old.keys() if key not in written and not key.startswith(_TASK)}
    changed = sorted(key for key in (old.keys() | new.keys()) - later if old.get(key) != new.get(key))
    return [_difference(key, old.get(key), new.get(key)) for key in changed]


def _difference(key: str, old: Any, new: Any) -> str:
    if not key.startswith(_TASK):
        name, marked, _ = str(old).partition("@")
        if marked and str(new).startswith(f"{name}@"):
            return f"{key} (the {name} holds another model now)"
        return f"{key} ({old!r} → {new!r})"
    name = key.removeprefix(_TASK)
    if old is None or new is None:
        return f"task {name!r} {'came' if old is None else 'went'}"
    return f"the templates or answers of task {name!r} changed"


def _within(key: str, blocks: tuple[str, ...]) -> bool:
    return any(key == block or key.startswith(block + ".") for block in blocks)


def public_base(base: str) -> str:
    """`base` as another machine would name it: a run by its name, wherever its folder lies."""
    return f"{RUN}{base.rsplit('/', 1)[-1]}" if base.startswith(RUN) else base


def identity_hash(keys: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that name an identity."""
    return hashlib.sha256(json.dumps(dict(keys), sort_keys=True).encode()).hexdigest()[:12]


def flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted key → value of nested mappings: {"a": {"b": 1}} gives {"a.b": 1}; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    items = (flat(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: leaf for item in items for key, leaf in item.items()}
