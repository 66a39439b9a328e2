"""The whole pipeline as a Ray job: `ray job submit … -- python jobs/pipeline.py --recipe R [key=value …]`."""

from apprentice.jobs import run_job

if __name__ == "__main__":
    run_job("pipeline")
