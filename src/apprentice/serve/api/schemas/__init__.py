"""Schemas of the HTTP API: request bodies, response bodies, and the error body."""
