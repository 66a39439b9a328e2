"""Training under Ray Train: driver, workers, elastic scaling, heartbeats, validation while training goes on."""
