"""The command that runs the pipeline on a cluster: submit."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from apprentice.cli.options import Json, Overrides, RecipeFile, Trust, screen_for, with_trust


def submit(
    recipe: RecipeFile,
    overrides: Overrides = None,
    address: Annotated[str, typer.Option(help="The cluster's dashboard, http:// or https://.")] = "http://127.0.0.1:8265",
    follow: Annotated[bool, typer.Option(help="Show the job's output until it ends.")] = False,
    deploy: Annotated[bool, typer.Option(help="Serve the model on the same cluster once it has been evaluated.")] = False,
    install: Annotated[bool, typer.Option(help="Let the nodes install this version of apprentice from the package index.")] = False,
    ca: Annotated[
        str | None,
        typer.Option(envvar="SSL_CERT_FILE", help="Certificate file, where the dashboard's is signed by a CA of your own."),
    ] = None,
    trust: Trust = False,
    json: Json = False,
) -> None:
    """Run the whole pipeline as a Ray job; the same command again follows the live job, or resumes a run that stopped."""
    from apprentice.jobs import submit as jobs

    screen = screen_for(json)
    sent = jobs.submit(recipe, with_trust(overrides, trust), address=address, ca=ca, deploy=deploy, install=install)
    screen.say(f"job {sent.job} {'is running already' if sent.attached else 'submitted'}")
    if follow:
        try:
            jobs.follow(sent, address=address, ca=ca, say=screen.say)
        except KeyboardInterrupt:
            if sys.stdin.isatty() and typer.confirm("\nStop the job too?", default=False, err=True):
                jobs.stop(sent.job, address=address, ca=ca)
                screen.say("the job is stopped; the same command goes on with the run.")
            else:
                screen.say("the job goes on; the same command follows it again.")
            raise typer.Exit(1) from None
    screen.result({"job": sent.job, "run": sent.run, "attached": sent.attached, "followed": follow}, sent.run)
