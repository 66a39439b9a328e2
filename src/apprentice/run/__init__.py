"""The run folder, what makes two runs the same, and the fence that keeps two writers apart."""
