"""`ray job submit … -- python jobs/train.py --recipe R [key=value …]`: fine-tune, or go on where the run stopped."""

from apprentice.jobs import run_job

if __name__ == "__main__":
    run_job("train")
