"""The identity of a run: all keys of its recipe that shape learning, with tasks and models by content and never by path.

In format 2, a task is represented by the hash of its definition, a model folder by the hash of its files, and another run's model
by the hash of its weights. Runs of format 1 are compared by the paths of tasks and folders. Data rows are not part of the
identity; the index checks them.
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
from apprentice.recipe import OBJECTIVES, RUN, Recipe, RewardTerm
from apprentice.run.reward_source import source_sha256
from apprentice.storage import Folder, is_uri
from apprentice.tasks.definition import definition_of
from apprentice.tasks.registry import Entry, Find, find_tasks

# Keys for the place and the hardware of a run, or for what happens after training; they do not shape learning.
NOT_IDENTITY = (
    "name",
    "storage",
    "data.root",
    "model.attention",
    "model.trust",
    "training.workers",
    "training.sequence_parallel",
    "training.resources",
    "training.micro_batch",
    "training.deepspeed",
    "training.activation_checkpointing",
    "training.kernels",
    "training.compile",
    "training.checkpoint",
    "training.max_failures",
    "training.hang_timeout_s",
    "training.sample_every_steps",
    "training.sample_instructions",
    "training.tracking",
    "evaluation",
    "serving",
)
# Keys added in later versions: left out at their defaults, so that older runs keep their identity.
LATER = (
    *("training.objective", *(f"training.{name}" for name in OBJECTIVES), "training.optimizer.states"),
    *("training.router_loss", "tuning.experts", "tuning.rslora", "tuning.dora"),
    "training.optimizer.loraplus_ratio",
    *("data.chat_template", "data.qualities", "data.control_tokens", "data.reasoning", "data.lanes"),
)
# Format of a run folder. 1: before the number was stored. 2: new rules for encoding, CSV and identity, in new runs only.
FORMAT = 2
CONTRACT_FILE = "apprentice.json"
GATE_FILE = "gate.json"  # beside the weights: whether they passed their recipe's quality gate
ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # files of a PEFT adapter
ADAPTER = "adapter"  # folder beside a model's weights, with an adapter that cannot be merged into them
# Files of a model folder that shape learning besides the weights. Reports, cards and generation settings do not.
_MODEL_FILES = ("config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "*.py")
_TASK = "data.tasks."  # prefix of the keys of task definitions


def identity(recipe: Recipe, version: int = FORMAT, *, anywhere: bool = False, find: Find = find_tasks) -> dict[str, Any]:
    """The identity of `recipe` as dotted key → JSON value, by the rules of format `version`.

    `find` resolves an entry of `data.tasks` to tasks. With `anywhere`, task files that are not on this machine are represented by
    their entry in the recipe; otherwise they raise `TaskError`.
    """
    keys = flatten(recipe.model_dump(mode="json"))
    set_keys = flatten(recipe.model_dump(mode="json", exclude_defaults=True))
    kept = {
        key: value for key, value in keys.items() if not _within(key, NOT_IDENTITY) and (key in set_keys or not _within(key, LATER))
    }
    if recipe.data.qualities is not None:  # as an ordered list, because of equal weights the first class is the best
        kept = {key: value for key, value in kept.items() if not key.startswith("data.qualities.")}
        kept["data.qualities"] = [[name, *one.model_dump(mode="json").values()] for name, one in recipe.data.qualities.items()]
    named = {"model.base": recipe.model.base, **recipe.training.models}
    if not isinstance(recipe.training.grpo.reward, str) and (terms := recipe.training.grpo.reward_terms):
        named.pop("training.grpo.reward", None)
        kept = {key: value for key, value in kept.items() if not _within(key, ("training.grpo.reward",))}
        kept["training.grpo.reward"] = [_reward_term(term) for term in terms]
    if version == 1:
        return kept | {key: public_base(base) for key, base in named.items()} | {"data.tasks": _paths(recipe)}
    del kept["data.promptsource"]  # a folder, whose content is in the tasks' definitions
    definitions = _definitions(recipe.data.entries, find, anywhere=anywhere)
    tasks = {"data.tasks": list(definitions), **{f"{_TASK}{name}": definition for name, definition in definitions.items()}}
    return kept | {key: _model(base) for key, base in named.items()} | tasks


def _paths(recipe: Recipe) -> list[Any]:
    """`data.tasks` in the identity of format 1."""
    return [
        (entry if entry.islower() or "/" not in entry else Path(entry).name)
        if isinstance(entry, str)
        else entry.model_dump(mode="json", exclude_none=True)
        for entry in recipe.data.tasks
    ]


def _definitions(entries: Sequence[Entry], find: Find, *, anywhere: bool) -> dict[str, str]:
    """Task → the hash of its definition (16 hex digits), in the recipe's order."""
    definitions: dict[str, str] = {}
    for entry in entries:
        try:
            definitions |= {task.name: definition_of(task)[:16] for task in find(entry, Path.cwd())}
        except TaskError:
            if not anywhere:
                raise
            definitions[json.dumps(entry, sort_keys=True)] = "not on this machine"
    return definitions


def _model(base: str) -> str:
    """A model in the identity: a run's with its weights' hash, a folder as the hash of its files, a hub id or URI as it is."""
    if base.startswith(RUN):
        contract = Folder.at(base.removeprefix(RUN)) / "model" / CONTRACT_FILE
        weights = f"@{contract.read_json()['weights_sha256'][:16]}" if contract.exists() else ""
        return f"{public_base(base)}{weights}"
    folder = Path(base).expanduser()
    return f"folder@{model_sha256(folder)[:16]}" if (folder / "config.json").is_file() else base


def _reward_term(term: RewardTerm) -> dict[str, Any]:
    """A reward's term in the identity: models and functions by content, without its limits."""
    keys = term.model_dump(mode="json", exclude_defaults=True, exclude={"cpu_s", "memory_gib"})
    if term.model:
        return keys | {"model": _model(term.model)}
    digest = source_sha256(term.function or "")
    return keys | ({"function": f"{term.function}@{digest[:16]}"} if digest else {})


def model_sha256(folder: Path) -> str:
    """sha256 over names and contents of the files in a model folder that shape learning, weights included."""
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
    """The differences of two identities, each in a few words for messages; empty if they are those of one run."""
    # A key added in a later version is missing in the old identity; at its default it changes nothing.
    set_keys = flatten(recipe.model_dump(mode="json", exclude_defaults=True))
    later = {key for key in new.keys() - old.keys() if key not in set_keys and not key.startswith(_TASK)}
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
    """`base` without paths of this machine: a run is named by `run:NAME` alone, other bases are unchanged."""
    return f"{RUN}{base.rsplit('/', 1)[-1]}" if base.startswith(RUN) else base


def is_place(text: str) -> bool:
    """Whether `text` names a place on some machine or store."""
    return text.startswith(("/", "./", "../", "~")) or (is_uri(text) and not any(map(str.isspace, text)))


def without_place(base: str) -> str:
    """`base` for other people: of a path or URI its last part alone, of a run its name."""
    named = public_base(base)
    return named.rstrip("/").rsplit("/", 1)[-1] if is_place(named) else named


def identity_hash(keys: Mapping[str, Any]) -> str:
    """12 hexadecimal digits that name an identity."""
    return hashlib.sha256(json.dumps(dict(keys), sort_keys=True).encode()).hexdigest()[:12]


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Flattens nested mappings to dotted keys: {"a": {"b": 1}} gives {"a.b": 1}; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    items = (flatten(inner, f"{prefix}.{key}" if prefix else str(key)) for key, inner in value.items())
    return {key: leaf for item in items for key, leaf in item.items()}
