"""Conditional creation of S3 objects (`If-None-Match: *`), which `pyarrow.fs` does not offer.

The store and its credentials come from where pyarrow takes them: AWS's environment variables, files and roles.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

TAKEN = {"PreconditionFailed", "ConditionalRequestConflict"}  # the object exists, or another writer is creating it
UNKNOWN = {"NotImplemented"}  # the store does not support conditional writes
UPLOAD_ATTEMPTS, TIMEOUT_S = 4, 20


def create_object(uri: str, data: bytes) -> bool | None:
    """Creates `s3://bucket/key` with `data`: True if created, False if it exists, None if the store has no conditional writes.

    Raises `OSError` for a store that does not answer or refuses the write.
    """
    from botocore.exceptions import BotoCoreError, ClientError

    bucket, _, key = uri.removeprefix("s3://").partition("/")
    try:
        _client().put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except ClientError as error:
        code = error.response.get("Error", {}).get("Code")
        if code in TAKEN | UNKNOWN:
            return False if code in TAKEN else None
        raise OSError(f"{uri} cannot be written: {error}") from error
    except BotoCoreError as error:
        raise OSError(f"{uri} cannot be written: {error}") from error
    return True


def _client() -> Any:
    return _made(tuple(sorted((name, value) for name, value in os.environ.items() if name.startswith("AWS_"))))


@cache
def _made(environment: tuple[tuple[str, str], ...]) -> Any:
    """The S3 client for these environment variables, cached: making one takes 0.1 s, and its connections stay open."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": UPLOAD_ATTEMPTS}
    session = boto3.session.Session()  # not the default session, which keeps the first credentials that it found
    return session.client("s3", config=Config(retries=retries, connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S))
