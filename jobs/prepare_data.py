"""`ray job submit … -- python jobs/prepare_data.py --recipe R [key=value …]`: freeze the indices of a recipe's tasks."""

from apprentice.jobs import run_job

if __name__ == "__main__":
    run_job("prepare")
