"""The stages of the pipeline as they run on a cluster, each as a job.

    python -m apprentice.jobs pipeline --recipe R [--recipe R2 …] [key=value …]

Several recipes run in order, and each may start from the run of an earlier one. `apprentice submit` starts this command; the
scripts in `jobs/` run the same stages through `ray job submit`. Progress is printed as plain lines, and exit codes are those
of the command line.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

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
    """Freezes the index of each task; prints the run folder."""
    screen.result({}, pipeline.prepare_run(recipe, progress=screen.progress)["run"])


def train(recipe: Recipe, screen: Screen) -> None:
    """Fine-tunes, or resumes the run; prints the run folder."""
    result = pipeline.train_run(recipe, progress=screen.progress)
    screen.say(pipeline.training_sentence(result))
    screen.result({}, result["run"])


def evaluate(recipe: Recipe, screen: Screen) -> None:
    """Evaluates the run beside its base model; prints the report's folder."""
    pipeline.check_definitions(recipe)
    screen.result({}, str(pipeline.evaluate_run(recipe, progress=screen.progress)[1]))


def run_pipeline(recipe: Recipe, screen: Screen, *, deploy: bool = False) -> None:
    """Prepares, trains, evaluates and, with `deploy`, deploys; skips each stage that was finished with the same identity.

    Prints the run folder last. Raises `EvaluationError` for a model that does not pass the recipe's quality gate; it is not
    deployed. With `deploy`, the errors of `deploy.serve_config` are raised before anything is trained.
    """
    run = Run(Folder.at(recipe.storage) / recipe.name)
    if deploy:
        serve_config(str(run.model), recipe)  # refuses what could not be deployed before anything is trained
    with ray_session():
        result = pipeline.train_run(recipe, progress=screen.progress)  # prepares first, if need be
        screen.say(pipeline.training_sentence(result) if not result["already"] else "trained already, with the same identity")
        identity_of_report = evaluation_identity(recipe, run.format, run.tasks().find_again)
        if run.status().get("evaluated") == identity_of_report and (run.report / "report.json").exists():
            screen.say("evaluated already, with the same settings")
        else:
            report, _ = pipeline.evaluate_run(recipe, progress=screen.progress)
            run.update_status(evaluated=identity_of_report)
            screen.say(report["summary"]["sentence"])
        if recipe.evaluation.gate is not None:
            pipeline.check_gate(run.model)
        if deploy:
            deployed = deploy_run(str(run.folder), recipe)
            screen.say(
                f"deployed as the Serve application {deployed.name!r}, port {deployed.port} of every node, path {deployed.path}"
            )
    screen.result({}, str(run.folder))


def evaluation_identity(recipe: Recipe, version: int = FORMAT, find: Find = find_tasks) -> str:
    """Hash of all that shapes a report: the run's identity and the recipe's evaluation settings.

    `version` is the run's format, `find` looks up a task by name or path.
    """
    settings = {f"evaluation.{key}": value for key, value in recipe.evaluation.model_dump(mode="json").items()}
    return identity_hash(identity(recipe, version, find=find) | settings)


PR_SET_PDEATHSIG = 1  # prctl(2): sets the signal that this process gets when its parent ends
PROGRAM = "python -m apprentice.jobs"
STAGES = {"prepare": prepare, "train": train, "evaluate": evaluate}


app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, help="Runs one stage of the pipeline as a Ray job.")
Recipes = Annotated[
    list[str], typer.Option("--recipe", help="Recipe file, or the name of one that is shipped; several make a chain.", metavar="R")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="Overrides, such as storage=/shared/runs.", metavar="KEY=VALUE")]


@app.command("prepare")
def prepare_command(recipe: Recipes, overrides: Overrides = None) -> None:
    """Freeze the index of each task; prints the run folder."""
    _run("prepare", recipe, overrides)


@app.command("train")
def train_command(recipe: Recipes, overrides: Overrides = None) -> None:
    """Fine-tune, or resume the run; prints the run folder."""
    _run("train", recipe, overrides)


@app.command("evaluate")
def evaluate_command(recipe: Recipes, overrides: Overrides = None) -> None:
    """Score the run beside its base model; prints the report's folder."""
    _run("evaluate", recipe, overrides)


@app.command("pipeline")
def pipeline_command(
    recipe: Recipes,
    overrides: Overrides = None,
    deploy: Annotated[bool, typer.Option("--deploy", help="Serve the last model on this cluster afterwards.")] = False,
) -> None:
    """Prepare, train, evaluate and, with --deploy, serve; skips what was finished with the same identity."""
    _run("pipeline", recipe, overrides, deploy=deploy)


def run_job(stage: str, words: list[str] | None = None) -> None:
    """Runs `stage` on each recipe named in `words` (default: the command line), in order.

    Ends the process with the command line's exit code where a stage fails.
    """
    try:
        app([stage, *(sys.argv[1:] if words is None else words)], prog_name=PROGRAM)
    except SystemExit as end:
        if end.code:
            raise


def _run(stage: str, names: Sequence[str], overrides: Sequence[str] | None, *, deploy: bool = False) -> None:
    screen = Screen()
    _end_with_the_shell()
    try:
        _same_version()
        recipes = [load_recipe(find_recipe(name), overrides or []) for name in names]
        pipeline.check_order(recipes)
        for recipe in recipes:
            if stage == "pipeline":
                run_pipeline(recipe, screen, deploy=deploy and recipe is recipes[-1])
            else:
                STAGES[stage](recipe, screen)
    except KeyboardInterrupt:
        screen.error("stopped by Ctrl-C; the same command goes on with the run.")
        sys.exit(1)
    except Exception as error:
        sys.exit(screen.failed(error))


def _end_with_the_shell() -> None:
    """Makes a job's driver end when the shell ends that Ray started it in, because an early stop may reach the shell alone.

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
    """Entry point of `python -m apprentice.jobs STAGE …`."""
    app(prog_name=PROGRAM)
