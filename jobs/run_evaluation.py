"""`ray job submit … -- python jobs/run_evaluation.py --recipe R [key=value …]`: score the recipe's run beside its base model."""

from apprentice.jobs import run_job

if __name__ == "__main__":
    run_job("evaluate")
