"""`python -m apprentice.jobs STAGE --recipe R [key=value …]`: one stage as a job."""

from apprentice.jobs.stages import main

main()
