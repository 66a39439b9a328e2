"""Sources of a task's rows: finding their files, converting them to Parquet, and random access to rows."""
