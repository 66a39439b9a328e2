"""`ray job submit … -- python jobs/pipeline.py --recipe R [key=value …]`: train and evaluate; prints the run folder last."""

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
