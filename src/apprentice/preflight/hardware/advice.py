"""Changes of a recipe with which it fits the hardware: each combination is tried in the estimate, and the fastest come first.

Of a combination that fits, no part can be left out. Those that change what is learned, and more nodes, come after the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

from apprentice.errors import RecipeError
from apprentice.preflight.hardware.hardware_estimate import HardwareEstimate, HardwareEstimator, place_recipe
from apprentice.recipe import Recipe
from apprentice.train.engine.deepspeed_config import rows_per_worker
from apprentice.train.optimizer import can_be_sharded

_SMALLER_METHODS = {"full": ("lora", "qlora"), "lora": ("qlora",)}  # tuning methods that take less memory
MOST_WAYS = 4
MOST_NODES = 64


@dataclass(frozen=True)
class Setting:
    """One key of a recipe with a new value. `changes_learning` says that another model comes of it."""

    key: str
    value: Any
    changes_learning: bool = False

    def __str__(self) -> str:
        return f"{self.key}={str(self.value).lower()}"


@dataclass(frozen=True)
class FittingVariant:
    """A way to make a recipe fit: settings to override, or other hardware, and its estimate."""

    settings: tuple[Setting, ...]
    estimate: HardwareEstimate
    other_hardware: bool = False

    @property
    def changes_learning(self) -> bool:
        """Whether another model comes of it."""
        return any(setting.changes_learning for setting in self.settings)

    def __str__(self) -> str:
        return f"--hardware {self.estimate.hardware}" if self.other_hardware else " ".join(map(str, self.settings))


def find_fitting_variants(estimate: HardwareEstimate, estimator: HardwareEstimator) -> list[FittingVariant]:
    """At most `MOST_WAYS` ways to make the recipe of `estimate` fit, the cheapest first; none if nothing that is known helps."""
    fitting = list(_fitting_combinations(estimate, estimator))
    same = sorted((way for way in fitting if not way.changes_learning), key=_seconds)
    other = sorted((way for way in fitting if way.changes_learning), key=_seconds)
    nodes = [way for way in [_more_nodes(estimate)] if way is not None]
    return [*same[:2], *nodes, *other][:MOST_WAYS]


def apply_settings(recipe: Recipe, settings: tuple[Setting, ...]) -> Recipe | None:
    """`recipe` with `settings`; None if they contradict it."""
    content = recipe.model_dump(exclude_unset=True)  # some keys may not stand beside others, not even with their defaults
    for setting in settings:
        *parents, last = setting.key.split(".")
        block: Any = content
        for parent in parents:
            block = block.setdefault(parent, {})
        block[last] = setting.value
    try:
        return Recipe.model_validate(content)
    except ValueError:
        return None


def _seconds(way: FittingVariant) -> float:
    return way.estimate.step.total / way.estimate.recipe.data.packing.length


def _fitting_combinations(estimate: HardwareEstimate, estimator: HardwareEstimator) -> Iterator[FittingVariant]:
    """Combinations of settings that fit, the smallest first, without those of which a part is enough."""
    choices = _choices(estimate)
    fitting_keys: list[frozenset[str]] = []  # keys of the combinations that fit
    for number in range(1, len(choices) + 1):
        for keys in combinations(choices, number):
            if any(smaller <= frozenset(keys) for smaller in fitting_keys):
                continue
            if (way := _fastest(estimate, estimator, [choices[key] for key in keys])) is not None:
                fitting_keys.append(frozenset(keys))
                yield way


def _fastest(estimate: HardwareEstimate, estimator: HardwareEstimator, choices: list[list[Setting]]) -> FittingVariant | None:
    """The fastest variant that fits, with one setting of each of `choices`."""
    fitting = []
    for settings in product(*choices):
        recipe = apply_settings(estimate.recipe, settings)
        if recipe is not None and (tried := estimator.estimate(recipe)).fits:
            fitting.append(FittingVariant(settings, tried))
    return min(fitting, key=_seconds, default=None)


def _choices(estimate: HardwareEstimate) -> Mapping[str, list[Setting]]:
    """Settings to try, by their keys: each takes less memory than what there is. Some need others, which the recipe checks."""
    training, data = estimate.recipe.training, estimate.recipe.data
    deepspeed, workers = training.deepspeed, training.max_workers
    rows = rows_per_worker(training, workers)
    is_fixed = isinstance(training.micro_batch, int)  # `auto` is as small as need be
    smaller = [size for size in range(1, estimate.micro) if rows % size == 0] if is_fixed else []
    lowest = deepspeed.stage + 1 if workers > 1 else max(2, deepspeed.stage + 1)  # alone only for what offloading asks for
    shorter = [length for length in (data.packing.length // 2, data.packing.length // 4) if length >= data.max_length]
    again = training.activation_checkpointing
    may_narrow = training.optimizer.name == "adamw" and training.optimizer.states == "float32"
    settings = [
        *(Setting("training.micro_batch", size) for size in smaller),
        *(Setting("training.deepspeed.stage", stage) for stage in range(lowest, 4)),
        *([] if again else [Setting("training.activation_checkpointing", True)]),
        *([] if deepspeed.offload != "none" else [Setting("training.deepspeed.offload", "cpu")]),
        *([] if deepspeed.offload_parameters != "none" else [Setting("training.deepspeed.offload_parameters", "cpu")]),
        *(Setting("tuning.method", method, True) for method in _SMALLER_METHODS.get(estimate.recipe.tuning.method, ())),
        *([Setting("training.optimizer.states", "8bit", True)] if may_narrow else []),
        *([Setting("training.optimizer.name", "adamw", True)] if not can_be_sharded(training.optimizer) else []),
        *(Setting("data.packing.length", length, True) for length in shorter),
    ]
    choices: dict[str, list[Setting]] = {}
    for setting in settings:
        choices.setdefault(setting.key, []).append(setting)
    return choices


def _more_nodes(estimate: HardwareEstimate) -> FittingVariant | None:
    """The recipe as it is on the fewest nodes, twice as many each time, on which it fits."""
    nodes = estimate.hardware.nodes * 2
    while nodes <= MOST_NODES:
        hardware = replace(estimate.hardware, nodes=nodes)
        try:
            tried = HardwareEstimator(hardware).estimate(place_recipe(estimate.recipe, hardware))
        except RecipeError:  # the batch cannot be divided among so many
            return None
        if tried.fits:
            return FittingVariant((), tried, other_hardware=True)
        nodes *= 2
    return None
