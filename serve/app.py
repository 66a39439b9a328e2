"""Import path of the endpoint for Ray Serve's config files: `serve.app:app` (see config.yaml beside it)."""

from apprentice.serve.deployment import application as app

__all__ = ["app"]
