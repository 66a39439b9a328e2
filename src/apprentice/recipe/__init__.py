"""The recipe: one YAML file that describes the whole pipeline, as strict pydantic models.

An unknown key or a wrong value raises `RecipeError` with the file's line and the nearest known name. Paths in the file are relative
to it; paths in command-line overrides are relative to the current directory.
"""

from __future__ import annotations

from apprentice.recipe.data import Collection, Data, Filters, Formats, Group, Mixture, Packing, Quality
from apprentice.recipe.evaluation import Evaluation, Gate
from apprentice.recipe.objective import DPO, GRPO, IPO, KTO, MODEL_KEYS, OBJECTIVES, ORPO, Distill, Objective, SimPO
from apprentice.recipe.recipe import Model, Recipe
from apprentice.recipe.recipe_file import (
    RUN,
    SHIPPED,
    dump_recipe,
    find_recipe,
    load_recipe,
    make_recipe,
    parse_recipe,
    shipped_name,
)
from apprentice.recipe.reward_terms import PYTHON, RewardTerm
from apprentice.recipe.serving import Replicas, Serving
from apprentice.recipe.training import (
    Checkpointing,
    DeepSpeed,
    Optimizer,
    Resources,
    Training,
    Tuning,
    WorkerRange,
    data_parallel_size,
)

__all__ = [
    "DPO",
    "GRPO",
    "IPO",
    "KTO",
    "MODEL_KEYS",
    "OBJECTIVES",
    "ORPO",
    "PYTHON",
    "RUN",
    "SHIPPED",
    "Checkpointing",
    "Collection",
    "Data",
    "DeepSpeed",
    "Distill",
    "Evaluation",
    "Filters",
    "Formats",
    "Gate",
    "Group",
    "Mixture",
    "Model",
    "Objective",
    "Optimizer",
    "Packing",
    "Quality",
    "Recipe",
    "Replicas",
    "Resources",
    "RewardTerm",
    "Serving",
    "SimPO",
    "Training",
    "Tuning",
    "WorkerRange",
    "data_parallel_size",
    "dump_recipe",
    "find_recipe",
    "load_recipe",
    "make_recipe",
    "parse_recipe",
    "shipped_name",
]
