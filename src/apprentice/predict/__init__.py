"""Batch prediction: a file of instructions to a folder of replies, on Ray Data."""
