"""Memory of a training worker: estimated beforehand, measured while it runs."""
