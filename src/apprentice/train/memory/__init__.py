"""Memory of a training worker: estimated before, measured while it runs."""
