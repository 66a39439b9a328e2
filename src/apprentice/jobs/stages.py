"""What runs on a cluster: each stage of the pipeline as a job, progress as plain lines, exit codes as the command line has them.

    python -m apprentice.jobs pipeline --recipe R [--recipe R2 …] [key=value …]

Several recipes run in order, and each may start from the run of one before it. `apprentice submit` starts it so; the scripts
in `jobs/` are the same stages for `ray job submit`.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import signal
import sys

from apprentice import __version__, pipeline
from apprentice.console import Screen
from apprentice.errors import ResourcesError
from apprentice.jobs.deploy import deploy_run, serve_config
from apprentice.ray_cluster.nodes import is_job
from apprentice.ray_cluster.session import VERSION_VARIABLE, ray_session
from apprentice.recipe import Recipe, find_recipe, load_recipe
from apprentice.run.folder import Run
from apprentice.run.identity import FORMAT, identity, identity_hash
from apprentice.storage import Folder
from apprentice.tasks.registry import Find, find_tasks


def prepare(recipe: Recipe, screen: Screen) -> None:
    """Freezes the indices; prints the run folder."""
    screen.result({}, pipeline.prepare(recipe, progress=screen.progress)["run"])


def train(recipe: Recipe, screen: Screen) -> None:
    """Fine-tunes, or goes on; prints the run folder."""
    result = pipeline.train(recipe, progress=screen.progress)
    screen.say(pipeline.training_sentence(result))
    screen.result({}, result["run"])


def evaluate(recipe: Recipe, screen: Screen) -> None:
    """Scores the run beside its base model; prints the report's folder."""
    pipeline.check_definitions(recipe)
    screen.result({}, str(pipeline.evaluate_run(recipe, progress=screen.progress)[1]))


def run_pipeline(recipe: Recipe, screen: Screen, *, deploy: bool = False) -> None:
    """Prepare, train, evaluate and, if asked, deploy; what is there with the same identity is not made again.

    Prints the run folder last. Raises `EvaluationError` for a model that does not pass the recipe's gate, which is not deployed,
    and what `deploy.serve_config` raises, before anything is trained.
    """
    run = Run(Folder.at(recipe.storage) / recipe.name)
    if deploy:
        serve_config(str(run.model), recipe)  # refuses what could not be deployed before anything is trained
    with ray_session():
        result = pipeline.train(recipe, progress=screen.progress)  # freezes the indices first, unless they are there
        screen.say(pipeline.training_sentence(result) if not result["already"] else "trained already, with the same identity")
        wanted = evaluation_identity(recipe, run.format, run.tasks().find_again)
        if run.status().get("evaluated") == wanted and (run.report / "report.json").exists():
            screen.say("evaluated already, with the same settings")
        else:
            report, _ = pipeline.evaluate_run(recipe, progress=screen.progress)
            run.update_status(evaluated=wanted)
            screen.say(report["summary"]["sentence"])
        if recipe.evaluation.gate is not None:
            pipeline.passed_gate(run.model)
        if deploy:
            there = deploy_run(str(run.folder), recipe)
            screen.say(f"deployed as the Serve application {there.name!r}, port {there.port} of every node, path {there.path}")
    screen.result({}, str(run.folder))


def evaluation_identity(recipe: Recipe, version: int = FORMAT, find: Find = find_tasks) -> str:
    """Names a report: what the run learned from and how it was scored."""
    settings = {f"evaluation.{key}": value for key, value in recipe.evaluation.model_dump(mode="json").items()}
    return identity_hash(identity(recipe, version, find=find) | settings)


PR_SET_PDEATHSIG = 1  # prctl(2): the signal that this process gets when its parent ends
STAGES = {"prepare": prepare, "train": train, "evaluate": evaluate, "pipeline": run_pipeline}


def run_job(stage: str, words: list[str] | None = None) -> None:
    """Runs `stage` on each recipe that the command line names, in order; exit codes as the command line's."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--recipe", required=True, action="append", help="recipe file, or the name of one that is shipped; several make a chain"
    )
    if stage == "pipeline":
        parser.add_argument("--deploy", action="store_true", help="serve the last model on this cluster afterwards")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides, such as storage=/shared/runs")
    arguments = parser.parse_args(words)
    screen = Screen()
    _end_with_the_shell()
    try:
        _same_version()
        recipes = [load_recipe(find_recipe(name), arguments.overrides) for name in arguments.recipe]
        pipeline.check_order(recipes)
        for recipe in recipes:
            if stage == "pipeline":
                run_pipeline(recipe, screen, deploy=arguments.deploy and recipe is recipes[-1])
            else:
                STAGES[stage](recipe, screen)
    except Exception as error:
        sys.exit(screen.failed(error))


def _end_with_the_shell() -> None:
    """Lets a job's driver end when the shell does that Ray started it in: a stop that came early may have reached the shell alone.

    `apprentice submit` needs none of this, since its shell becomes the driver; `ray job submit … -- python …` does.
    """
    shell = os.getpgrp()  # Ray gives each job a process group, which the shell leads
    if not is_job() or shell == os.getpid():
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        os.kill(shell, 0)
    except ProcessLookupError:
        sys.exit(128 + signal.SIGTERM)


def _same_version() -> None:
    sent_by = os.environ.get(VERSION_VARIABLE, __version__)
    if sent_by != __version__:
        raise ResourcesError(
            f"the cluster has apprentice {__version__} and the job was sent by {sent_by}; install the same version on both, or say"
            " `apprentice submit --install`."
        )


def main() -> None:
    """`python -m apprentice.jobs STAGE …`."""
    if len(sys.argv) < 2 or sys.argv[1] not in STAGES:
        print(f"usage: python -m apprentice.jobs {{{','.join(STAGES)}}} --recipe R [key=value …]", file=sys.stderr)
        sys.exit(2)
    run_job(sys.argv[1], sys.argv[2:])


if __name__ == "__main__":
    main()
