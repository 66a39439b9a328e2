"""The pipeline as Ray jobs: `submit` is the client, `stages` runs on the cluster."""

from __future__ import annotations


def run_job(stage: str, words: list[str] | None = None) -> None:
    """Runs `stage` on each recipe that the command line names; see `apprentice.jobs.stages.run_job`."""
    from apprentice.jobs import stages  # imported here: the client needs nothing of what the stages import

    stages.run_job(stage, words)
