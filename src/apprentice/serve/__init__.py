"""Serving: an HTTP endpoint with OpenAI's API over model folders, deployed on Ray Serve."""
