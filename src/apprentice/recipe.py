"""The recipe: one YAML file that describes the whole road, as strict pydantic models.

An unknown key or a wrong value is refused at once, with the file's line and the nearest right name. Relative paths are
relative to the recipe file. Knows nothing of datasets, clusters or models beyond their names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from apprentice.errors import RecipeError, did_you_mean
from apprentice.storage import is_uri

Positive = Annotated[int, Field(ge=1)]
SHIPPED = Path(__file__).resolve().parent / "recipes"
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Model(_Strict):
    """The pretrained model that is tuned."""

    base: str = Field(description="Hub id, folder, or a model that a package carries (`smollm2-135m-instruct`).")
    dtype: Literal["auto", "bfloat16", "float32"] = Field(
        "auto", description="auto: bfloat16 where the hardware multiplies it fast."
    )
    attention: Literal["auto", "sdpa", "eager"] = "auto"


class Mixture(_Strict):
    """How often each task is drawn."""

    strategy: Literal["equal", "proportional", "temperature", "weights"] = "proportional"
    cap: Positive | None = Field(None, description="Rows at which a task's size stops counting (T5's K).")
    temperature: float = Field(2.0, gt=0.0, description="Shares go with size ** (1 / temperature).")
    weights: dict[str, Annotated[float, Field(gt=0.0)]] | None = Field(None, description="Task → weight, for `weights`.")

    @model_validator(mode="after")
    def _weights_belong(self) -> Self:
        if (self.strategy == "weights") != (self.weights is not None):
            raise ValueError("`weights` belongs to `strategy: weights`, and only to it")
        return self


class Formats(_Strict):
    """Share of plan positions drawn in each format; they add up to 1."""

    zero_shot: Share = 1.0
    few_shot: Share = 0.0
    inverted: Share = 0.0

    @model_validator(mode="after")
    def _add_up(self) -> Self:
        total = self.zero_shot + self.few_shot + self.inverted
        if abs(total - 1.0) > 1e-6:
            raise ValueError(f"the formats' shares add up to {total:g}, not to 1")
        return self


class Packing(_Strict):
    """How examples share rows."""

    length: Positive = Field(1024, description="Tokens of one packed row.")
    strategy: Literal["best_fit", "none"] = "best_fit"


class Data(_Strict):
    """Datasets, tasks, mixture and packing."""

    root: str | None = Field(None, description="Searched first: <root>/<dataset>/<split>.parquet; then the hub.")
    tasks: tuple[str, ...] = Field(min_length=1, description="Library names, clusters, or paths of task files.")
    hold_out: tuple[str, ...] = Field((), description="Clusters or tasks never trained on, always scored.")
    validation: Share = Field(0.02, description="Share of training rows, chosen by hash, that are never trained on.")
    layout: Literal["plain", "alpaca", "chat"] = "chat"
    system: str = Field("", description="System text; empty: the layout's own.")
    max_length: Positive = Field(1024, description="Tokens of one example.")
    mixture: Mixture = Mixture()
    formats: Formats = Formats()
    shots: tuple[Positive, Positive] = Field((1, 3), description="Least and most exemplars of a few-shot example.")
    packing: Packing = Packing()
    window: Positive = Field(1024, description="Positions of the plan that are rendered and packed together.")
    max_bad_rows: Share = Field(0.001, description="Share of a task's rows that may be unusable before the run stops.")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.max_length > self.packing.length:
            raise ValueError(f"max_length {self.max_length} is more than packing.length {self.packing.length}")
        if self.shots[0] > self.shots[1]:
            raise ValueError(f"shots: least {self.shots[0]} is more than most {self.shots[1]}")
        return self


class Tuning(_Strict):
    """Which weights are trained."""

    method: Literal["full", "lora"] = "lora"
    rank: Positive = 16
    alpha: float | None = Field(None, description="LoRA scale × rank; default 2 × rank.")
    dropout: Share = 0.0


class WorkerRange(_Strict):
    min: Positive
    max: Positive

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min > self.max:
            raise ValueError(f"workers: min {self.min} is more than max {self.max}")
        return self


class Resources(_Strict):
    """What each training worker reserves."""

    cpus: float = Field(1.0, gt=0.0)
    gpus: float = Field(0.0, ge=0.0)


class Optimizer(_Strict):
    name: Literal["adamw"] = "adamw"
    learning_rate: float = Field(2e-4, gt=0.0)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    betas: tuple[Share, Share] = (0.9, 0.999)
    epsilon: float = Field(1e-8, gt=0.0)
    clip: float = Field(1.0, ge=0.0, description="Largest gradient norm; 0 turns clipping off.")


class DeepSpeed(_Strict):
    stage: Literal[0, 1, 2, 3] = 2
    offload: Literal["none", "cpu"] = "none"


class Checkpointing(_Strict):
    every_steps: Positive = 100
    keep: Positive = 2
    best_by: Literal["validation_loss"] = "validation_loss"


class Training(_Strict):
    """The run on Ray Train and DeepSpeed."""

    workers: Positive | WorkerRange = 1
    resources: Resources = Resources()
    steps: Positive | None = None
    tokens: Positive | None = Field(None, description="Real tokens, padding excluded; the step that crosses is finished.")
    epochs: float | None = Field(None, gt=0.0, description="Each kept row up to its cap once per epoch.")
    global_batch: Positive = Field(8, description="Packed rows per optimizer step over all workers.")
    micro_batch: Positive | Literal["auto"] = Field("auto", description="Packed rows at once on one worker.")
    optimizer: Optimizer = Optimizer()
    deepspeed: DeepSpeed = DeepSpeed()
    checkpoint: Checkpointing = Checkpointing()
    max_failures: Annotated[int, Field(ge=0)] = 3
    hang_timeout_s: float = Field(1800.0, gt=0.0, description="Seconds after which a collective that does not end is an error.")

    @property
    def max_workers(self) -> int:
        return self.workers.max if isinstance(self.workers, WorkerRange) else self.workers

    @property
    def min_workers(self) -> int:
        return self.workers.min if isinstance(self.workers, WorkerRange) else self.workers

    @model_validator(mode="after")
    def _one_end_and_even_batch(self) -> Self:
        given = [end for end in (self.steps, self.tokens, self.epochs) if end is not None]
        if len(given) != 1:
            raise ValueError("give exactly one of `steps`, `tokens` and `epochs`")
        if self.global_batch % self.max_workers:
            raise ValueError(
                f"global_batch {self.global_batch} cannot be divided among {self.max_workers} workers;"
                f" choose a multiple of {self.max_workers}"
            )
        rows = self.global_batch // self.max_workers
        if isinstance(self.micro_batch, int) and rows % self.micro_batch:
            raise ValueError(f"micro_batch {self.micro_batch} does not divide the {rows} rows of one worker; choose a divisor")
        if self.steps is not None and self.optimizer.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.optimizer.warmup_steps} is not shorter than the run's {self.steps} steps")
        return self


class Evaluation(_Strict):
    shots: tuple[Annotated[int, Field(ge=0)], ...] = Field((0,), min_length=1)
    max_examples: Positive = Field(100, description="Test rows per task.")
    templates_per_row: Positive = Field(1, description="Wordings that each row meets.")
    max_new_tokens: Positive = 64
    baseline_shots: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="Exemplars for the base model; empty list: no base model; default: as `shots`."
    )


class Replicas(_Strict):
    min: Positive = 1
    max: Positive = 1


class Serving(_Strict):
    engine: Literal["auto", "transformers"] = "auto"
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    replicas: Replicas = Replicas()
    max_running: Positive = Field(32, description="Requests decoded together by one replica.")
    max_queued_requests: Positive = 64
    context: Positive = Field(2048, description="Tokens of prompt and reply together.")


class Recipe(_Strict):
    """One execution of the whole road."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Name of the run's folder.")
    seed: int = 0
    storage: str = Field("./runs", description="Where runs lie: a folder or a URI that every node reaches.")
    model: Model
    data: Data
    tuning: Tuning = Tuning()
    training: Training
    evaluation: Evaluation = Evaluation()
    serving: Serving = Serving()


def find_recipe(name: str) -> Path:
    """The file that `name` means: a path, or a recipe that the package ships. Raises `RecipeError`."""
    shipped = {file.stem: file for file in sorted(SHIPPED.glob("*.yaml"))}
    if Path(name).is_file():
        return Path(name)
    if name in shipped:
        return shipped[name]
    raise RecipeError(
        f"{name!r} is not a file and not a recipe that is shipped ({', '.join(shipped)}).{did_you_mean(name, shipped)}"
    )


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in the file `path`, with `key.path=value` overrides applied.

    Raises `RecipeError` with file, line, key, reason and the nearest right name.
    """
    file = Path(path)
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: the recipe cannot be read ({error.__class__.__name__}); check the path.") from error
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise RecipeError(f"{file}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise RecipeError(f"{file}: a recipe is a mapping of keys, such as `name:` and `model:`; this file holds none.")
    for override in overrides:
        _apply(content, override)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise RecipeError(_sentence(error, file, text)) from error
    return _with_absolute_paths(recipe, file.absolute().parent)


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` gives the same recipe back."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _apply(content: dict[str, Any], override: str) -> None:
    key, equals, value = override.partition("=")
    if not equals:
        raise RecipeError(f"{override!r} is not an override; write key.path=value, for example training.steps=10.")
    *parents, last = key.strip().split(".")
    place = content
    for parent in parents:
        inner = place.get(parent)
        place[parent] = inner if isinstance(inner, dict) else {}
        place = place[parent]
    try:
        place[last] = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(f"{override!r}: the value is not YAML: {' '.join(str(error).split())}") from error


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    def absolute(path: str) -> str:
        return path if is_uri(path) else str((folder / Path(path).expanduser()).resolve())

    tasks = tuple(absolute(entry) if entry.endswith((".yaml", ".yml")) else entry for entry in recipe.data.tasks)
    data = recipe.data.model_copy(update={"tasks": tasks, "root": recipe.data.root and absolute(recipe.data.root)})
    base = recipe.model.base
    model = recipe.model.model_copy(update={"base": absolute(base) if base.startswith((".", "/", "~")) else base})
    return recipe.model_copy(update={"storage": absolute(recipe.storage), "data": data, "model": model})


def _sentence(error: ValidationError, file: Path, text: str) -> str:
    errors = error.errors()
    start = _keys_of(errors[0]["loc"])
    # Of a union (`workers: 2` or a range) each branch complains; the one that got furthest is about what was written.
    same = [other for other in errors if _keys_of(other["loc"])[: len(start)] == start]
    first = max(same, key=lambda other: (other["type"] == "value_error", len(other["loc"])))
    keys = _keys_of(first["loc"])
    dotted = ".".join(str(key) for key in keys)
    where = f"{file}:{_line(yaml.compose(text), keys)}: {dotted + ': ' if dotted else ''}"
    if first["type"] == "extra_forbidden":
        known = _fields_at(keys[:-1])
        return f"{where}not a key of a recipe.{did_you_mean(str(keys[-1]), known)} Known here: {', '.join(known)}."
    if first["type"] == "missing":
        return f"{where}this key is needed, and missing."
    return f"{where}{first['msg'].removeprefix('Value error, ')} (it is {_shown(first['input'])})."


def _keys_of(place: Sequence[str | int]) -> list[str | int]:
    """The keys of a pydantic error's place, without the names it gives to the branches of a union."""
    return [
        part for part in place if isinstance(part, int) or (part.replace("_", "").isalnum() and part not in ("int", "WorkerRange"))
    ]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else "the block that starts here"


def _fields_at(keys: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Recipe
    for key in keys:
        annotation: Any = model.model_fields[str(key)].annotation
        options = [annotation, *getattr(annotation, "__args__", ())]
        model = next((option for option in options if isinstance(option, type) and issubclass(option, BaseModel)), model)
    return list(model.model_fields)


def _line(node: yaml.Node | None, keys: Sequence[Any]) -> int:
    """The 1-based line of the deepest of `keys` that the file holds (an override's key may not be in it)."""
    line = 1
    for key in keys:
        if isinstance(node, yaml.MappingNode):
            found = next((pair for pair in node.value if pair[0].value == str(key)), None)
            if found is None:
                break
            line, node = found[0].start_mark.line + 1, found[1]
        elif isinstance(node, yaml.SequenceNode) and isinstance(key, int) and key < len(node.value):
            node = node.value[key]
            line = node.start_mark.line + 1
        else:
            break
    return line
