"""Creates an object in S3 only where none lies yet, which `pyarrow.fs` cannot.

Finds the store and its keys as pyarrow does: AWS's environment variables, files and roles. Knows nothing of what is written.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Any

TAKEN = {"PreconditionFailed", "ConditionalRequestConflict"}  # somebody else's object is there, or on its way
UNKNOWN = {"NotImplemented"}  # a store that does not know conditions
UPLOAD_ATTEMPTS, TIMEOUT_S = 4, 20


def s3_create(uri: str, data: bytes) -> bool | None:
    """Writes `data` to `s3://bucket/key`; False if something lies there, None if the store knows no such condition.

    Raises `OSError` for a store that does not answer.
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
    """One client for each environment: making one takes a tenth of a second, and its connections stay open."""
    import boto3
    from botocore.config import Config

    retries = {"mode": "standard", "total_max_attempts": UPLOAD_ATTEMPTS}
    session = boto3.session.Session()  # not the default one, which keeps the first keys that it saw
    return session.client("s3", config=Config(retries=retries, connect_timeout=TIMEOUT_S, read_timeout=TIMEOUT_S))
