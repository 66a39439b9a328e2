"""Accuracy of the memory estimate: expected against measured peak of a worker, for ZeRO stages 0 to 3, full tuning and LoRA.

Real runs of two workers on the built-in tasks, without GPUs. Resident memory is measured, with a checkpoint written during
training.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile

from apprentice.data.stream import make_corpus
from apprentice.ray_cluster.session import ray_session
from apprentice.recipe import Recipe
from apprentice.run.folder import open_run
from apprentice.train.distributed.driver import train
from benchmarks.figures import claim_stdout, report

MIB = 2**20


def recipe_of(arguments: argparse.Namespace, storage: str, method: str, stage: int) -> Recipe:
    """A recipe of four steps, with a checkpoint after the second."""
    return Recipe.model_validate(
        {
            "name": f"{method}-{stage}",
            "seed": 1,
            "storage": storage,
            "model": {"base": arguments.model, "dtype": arguments.dtype},
            "data": {
                "tasks": ["quickstart"],
                "validation": 0,
                "max_length": arguments.length,
                "packing": {"length": arguments.length},
                "window": 256,
            },
            "tuning": {"method": method},
            "training": {
                "workers": 2,
                "steps": 4,
                "global_batch": 2 * arguments.rows,
                "micro_batch": arguments.rows,
                "optimizer": {"learning_rate": 1e-5, "warmup_steps": 1},
                "deepspeed": {"stage": stage},
                "checkpoint": {"every_steps": 2, "keep": 1},
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rows", type=int, default=2, help="packed rows at once")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--methods", nargs="+", default=["full", "lora"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 1, 2, 3])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as storage, ray_session():
        for method, stage in itertools.product(arguments.methods, arguments.stages):
            recipe = recipe_of(arguments, storage, method, stage)
            run = open_run(recipe)
            result = train(recipe, run, make_corpus(recipe, run), progress=lambda _: None)
            assert result.peak_memory is not None
            assert result.expected_memory is not None
            figures = {"expected_mib": round(result.expected_memory / MIB), "measured_mib": round(result.peak_memory / MIB)}
            part = result.expected_memory / result.peak_memory
            report(f"memory.{method}_zero{stage}", part, unit="ratio", **figures, runs=1, goal="0.8 to 1.2")


if __name__ == "__main__":
    claim_stdout()
    main()
