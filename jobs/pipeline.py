"""`ray job submit … -- python jobs/pipeline.py --recipe R [key=value …]`: the whole pipeline; prints the run folder last."""

from apprentice.jobs import run_job

if __name__ == "__main__":
    run_job("pipeline")
