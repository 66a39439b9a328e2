"""The stage `train` as a Ray job: `ray job submit … -- python jobs/train.py --recipe R [key=value …]`."""

from apprentice.jobs import run_job

if __name__ == "__main__":
    run_job("train")
