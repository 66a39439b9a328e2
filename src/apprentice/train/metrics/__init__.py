"""Metrics of a run and where they are written: tracker, TensorBoard, MLflow, Weights & Biases, Ray's metrics."""
