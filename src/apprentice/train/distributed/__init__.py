"""Training under Ray Train: the driver, its workers, elastic numbers, heartbeats, validation beside training."""
