"""Entry point of `python -m apprentice.jobs STAGE --recipe R [key=value …]`: one stage of the pipeline as a job."""

from apprentice.jobs.stages import main

main()
