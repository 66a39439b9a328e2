"""Replies to generation requests: token streams to text, log-probabilities, bodies and server-sent events."""
