"""Exports of a run's model: formats, the certificate of their equivalence, the hub."""
