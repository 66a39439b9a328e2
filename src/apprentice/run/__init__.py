"""The run folder: its layout, the identity of a run, and the fence that allows one writer at a time."""
