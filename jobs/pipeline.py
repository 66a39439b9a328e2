"""`ray job submit … -- python jobs/pipeline.py --recipe R [--recipe R2 …] [key=value …]`: train, evaluate, print the run folder.

Several recipes run in order, and each may start from the run of one before it (`model.base: run:NAME`).
"""

from apprentice import road
from apprentice.jobs import run_job


def pipeline(recipe, progress) -> None:
    """Each stage goes on where an earlier attempt of the same run stopped."""
    run = road.train(recipe, progress=progress)["run"]
    report, folder = road.evaluate_run(recipe, progress=progress)
    print(report["summary"]["sentence"])
    print(folder)
    print(run)


if __name__ == "__main__":
    run_job(pipeline)
