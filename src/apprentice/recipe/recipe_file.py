"""Loading and dumping of recipe files: overrides, absolute paths, and errors with file, line and the nearest known key."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from apprentice.errors import RecipeError, did_you_mean, requirement_of
from apprentice.plain_yaml import load_yaml
from apprentice.recipe.data import COLLECTION_KEYS, Collection
from apprentice.recipe.objective import MODEL_KEYS
from apprentice.recipe.recipe import Recipe
from apprentice.recipe.reward_terms import with_reward_model
from apprentice.storage import is_uri, refuse_credentials

RUN = "run:"  # prefix of a model that another run trained
_PATHS = ("storage", "data.root", "data.promptsource", "serving.adapters")
_REWARD = "training.grpo.reward"
_MODELS = ("model.base", *(f"training.{key}" for key in MODEL_KEYS), f"{_REWARD}.model", "evaluation.judge")  # names, or paths
_BRANCHES = ("int", "str", "WorkerRange", "Collection", "RewardTerm")  # of unions, in the places of pydantic's errors
_PATH_STARTS, _TASK_FILES = (".", "/", "~"), (".yaml", ".yml")  # how paths of models begin, and those of task files end
SHIPPED = Path(__file__).resolve().parents[1] / "recipes"


def find_recipe(name: str) -> Path:
    """The recipe file that `name` means: an existing path, or the name of a shipped recipe. Raises `RecipeError` for neither."""
    shipped = shipped_recipes()
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"{name!r} is not a file and not a recipe that is shipped ({', '.join(shipped)}).{did_you_mean(name, shipped)}"
    )


def shipped_recipes() -> dict[str, Path]:
    """The shipped recipes' files by name ("quickstart", "large/serve_8b")."""
    files = sorted([*SHIPPED.glob("*.yaml"), *SHIPPED.glob("large/*.yaml")])
    return {shipped_name(file): file for file in files}


def shipped_name(file: Path) -> str:
    """Name of a shipped recipe's file: its path among the shipped ones, without the suffix ("large/serve_8b")."""
    return file.relative_to(SHIPPED).with_suffix("").as_posix()


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path`, with `key.path=value` overrides applied and its paths made absolute.

    Paths in the file are relative to it. Paths in overrides, and the default storage, are relative to the current directory.
    Raises `RecipeError` with file, line, key, reason and the nearest known key.
    """
    return _with_absolute_paths(parse_recipe(path, [*map(_resolve_override_paths, overrides)]), Path(path).absolute().parent)


def parse_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path` with overrides applied and its paths as written.

    Raises `RecipeError` with file, line, key, reason and the nearest known key.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: the recipe cannot be read ({error.__class__.__name__}); check the path.") from error
    try:
        content = load_yaml(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys, such as `name:` and `model:`; this file holds none.")
    for override in overrides:
        _apply(content, override)
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_sentence(error, file, text, overrides)) from error


def make_recipe(values: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """A recipe from the values of its keys, with overrides applied and its paths, relative to the current directory, made absolute.

    Raises `RecipeError` with key, reason and the nearest known key.
    """
    content, applied = dict(values), [*map(_resolve_override_paths, overrides)]
    for override in applied:
        _apply(content, override)
    try:
        return _with_absolute_paths(Recipe.model_validate(content), Path.cwd())
    except ValidationError as error:
        raise RecipeError(_sentence(error, None, "", applied)) from error


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, from which `load_recipe` restores the same recipe."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(content: dict[str, Any], override: str) -> None:
    keys, value = _parse_override(override)
    *parents, last = keys.split(".")
    place = content
    for parent in parents:
        inner = place.get(parent)
        place[parent] = inner if isinstance(inner, dict) else {}
        place = place[parent]
    place[last] = value


def _parse_override(override: str) -> tuple[str, Any]:
    """(key, parsed value) of `key.path=value`. Raises `RecipeError`."""
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"{override!r} is not an override; write key.path=value, for example training.steps=10.")
    try:
        return key.strip(), load_yaml(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def _resolve_override_paths(override: str) -> str:
    """The override with the paths in it made absolute, relative to the current directory."""
    key, value = _parse_override(override)

    def absolute(path: str) -> str:
        return path if is_uri(path) else str(Path(path).expanduser().absolute())

    def from_here(key: str, content: Any) -> Any:
        if key == "data.tasks" and isinstance(content, list):
            return [_locate_entry(entry, absolute) for entry in content]
        if isinstance(content, dict):
            return {name: from_here(f"{key}.{name}", inner) for name, inner in content.items()}
        if key == _REWARD and isinstance(content, list):
            return [from_here(key, term) for term in content]
        if key == "serving.beside" and isinstance(content, list):
            return [_locate_model(entry, absolute) for entry in content]
        if key in _MODELS:
            return _locate_model(content, absolute)
        return absolute(content) if key in _PATHS and isinstance(content, str) else content

    resolved = from_here(key, value)
    return override if resolved == value else f"{key}={json.dumps(resolved)}"


def _locate_entry(entry: Any, absolute: Callable[[str], str]) -> Any:
    """An entry of `data.tasks` (a name, the path of a task file, or a collection as a mapping) with its paths made absolute."""
    if isinstance(entry, str):
        return absolute(entry) if entry.endswith(_TASK_FILES) else entry
    if not isinstance(entry, dict):
        return entry
    paths = {key: path for key in (*COLLECTION_KEYS, "test", "official_splits") if isinstance(path := entry.get(key), str)}
    named = paths.get("promptsource", ".")
    if not named.startswith(_PATH_STARTS) and not named.endswith(_TASK_FILES):
        return entry  # a name, not a path
    if "preferences" in paths and entry.get("splits") is not None:
        return entry  # the name of a dataset
    return entry | {key: absolute(path) for key, path in paths.items()}


def _locate_model(name: Any, absolute: Callable[[str], str]) -> Any:
    """A model's name, made absolute if it is a path; hub ids, runs and packaged models are unchanged."""
    return absolute(name) if isinstance(name, str) and name.startswith(_PATH_STARTS) else name


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(path: str) -> str:
        refuse_credentials(path)
        return path if is_uri(path) else str((folder / Path(path).expanduser()).resolve())

    def located(entry: str | Collection) -> str | Collection:
        if isinstance(entry, str):
            return str(_locate_entry(entry, absolute))
        return entry.model_copy(update=_locate_entry(entry.model_dump(), absolute))

    roots = {key: path and absolute(path) for key, path in (("root", recipe.data.root), ("promptsource", recipe.data.promptsource))}
    data = recipe.data.model_copy(update={"tasks": tuple(map(located, recipe.data.tasks)), **roots})
    # The default storage is not relative to the recipe file, which may be in the installed package.
    storage = absolute(recipe.storage) if "storage" in recipe.model_fields_set else str(Path(recipe.storage).absolute())

    def located_base(base: str) -> str:
        if base.startswith(RUN):
            named = base.removeprefix(RUN)
            return f"{RUN}{named if is_uri(named) or Path(named).is_absolute() else f'{storage}/{named}'}"
        return str(_locate_model(base, absolute))

    model = recipe.model.model_copy(update={"base": located_base(recipe.model.base)})
    changed: dict[str, Any] = {"storage": storage, "data": data, "model": model}
    if models := recipe.training.models:
        blocks = {}
        for dotted, name in models.items():
            _, block, key = dotted.split(".")
            settings = getattr(recipe.training, block)
            place = with_reward_model(settings.reward, located_base(name)) if dotted == _REWARD else located_base(name)
            blocks[block] = settings.model_copy(update={key: place})
        changed["training"] = recipe.training.model_copy(update=blocks)
    if recipe.serving.adapters or recipe.serving.beside:
        adapters, beside = recipe.serving.adapters, recipe.serving.beside
        places = {"adapters": adapters and absolute(adapters), "beside": tuple(_locate_model(one, absolute) for one in beside)}
        changed["serving"] = recipe.serving.model_copy(update=places)
    if judge := recipe.evaluation.judge:
        changed["evaluation"] = recipe.evaluation.model_copy(update={"judge": located_base(judge)})
    return recipe.model_copy(update=changed)


def _sentence(error: ValidationError, file: Path | None, text: str, overrides: Sequence[str]) -> str:
    """One sentence on the first fault of a recipe; `text` is the content of `file`, which a recipe made in Python lacks."""
    errors = error.errors()
    # An unknown key comes first, since a missing key is often the same one misspelt.
    unknown = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    start = _keys_of(unknown["loc"])
    # Each branch of a union (`workers: 2` or a range) reports an error; the deepest one is about the branch that was meant.
    same = [other for other in errors if _keys_of(other["loc"])[: len(start)] == start]
    first = max(same, key=lambda other: (other["type"] == "value_error", len(other["loc"])))
    keys = _keys_of(first["loc"])
    dotted = ".".join(str(key) for key in keys)
    # The last override of a key applies.
    matching = [override for override in overrides if f"{dotted}.".startswith(f"{_parse_override(override)[0]}.")]
    place = f"{file}:{_line(yaml.compose(text), keys)}" if file is not None else "recipe"
    place = f"override {matching[-1]!r}" if matching else place
    where = f"{place}: {dotted + ': ' if dotted else ''}"
    if first["type"] == "extra_forbidden":
        known = _fields_at(keys[:-1])
        return f"{where}not a key of a recipe.{did_you_mean(str(keys[-1]), known)} Known here: {', '.join(known)}."
    what = requirement_of(first["type"], first["msg"])
    return f"{where}{what}." if first["type"] == "missing" else f"{where}{what} (it is {_shown(first['input'])})."


def _keys_of(place: Sequence[str | int]) -> list[str | int]:
    """The keys in the location of a pydantic error, without the names of union branches."""
    return [part for part in place if isinstance(part, int) or (part.replace("_", "").isalnum() and part not in _BRANCHES)]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else "the block that starts here"


def _fields_at(keys: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in keys:
        if (field := model.model_fields.get(str(key))) is not None:  # else a name chosen by the user, such as a group's
            model = next(_blocks_in(field.annotation), model)
    return list(model.model_fields)


def _blocks_in(annotation: Any) -> Iterator[type[BaseModel]]:
    """The block classes in a type annotation: of the value itself, or of values in a container."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _blocks_in(part)


def _line(node: yaml.Node | None, keys: Sequence[Any]) -> int:
    """The 1-based line of the deepest of `keys` that the file contains (an override's key may be missing there)."""
    line = 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            pair_of_key = next((pair for pair in node.value if pair[0].value == str(key)), None)
            if pair_of_key is None:
                break
            line, node = pair_of_key[0].start_mark.line + 1, pair_of_key[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line
