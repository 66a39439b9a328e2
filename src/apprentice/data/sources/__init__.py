"""Where the rows of a task lie, and their conversion to Parquet."""
