"""Batch prediction on Ray Data: a file of instructions to a folder of replies."""
