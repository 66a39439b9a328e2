"""Report of an evaluation: table of predictions, schema, files, plots, comparison of runs and the quality gate."""
