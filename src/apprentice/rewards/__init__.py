"""Verifiable rewards: functions that give a model's reply a number, each run in a process of its own with limits."""
