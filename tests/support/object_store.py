"""An object store for tests: moto's S3 server in this process, which asks every request for the key of the one user it knows."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import boto3
import httpx
from moto.server import ThreadedMotoServer
from pyarrow.fs import FileSelector, S3FileSystem

BUCKET = "bucket"
REGION = "us-east-1"
_EVERYTHING = '{"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}'


@dataclass(frozen=True)
class ObjectStore:
    """A store at `url` with the bucket `BUCKET`, and the one key it lets in."""

    url: str
    key_id: str
    secret: str

    @property
    def environment(self) -> dict[str, str]:
        """What a process is given to reach it."""
        return {
            "AWS_ACCESS_KEY_ID": self.key_id,
            "AWS_SECRET_ACCESS_KEY": self.secret,
            "AWS_ENDPOINT_URL": self.url,
            "AWS_DEFAULT_REGION": REGION,
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    @property
    def objects(self) -> dict[str, bytes]:
        """The bucket's, by key."""
        store = S3FileSystem(access_key=self.key_id, secret_key=self.secret, endpoint_override=self.url, region=REGION)
        entries = store.get_file_info(FileSelector(BUCKET, recursive=True))
        return {file.path.removeprefix(f"{BUCKET}/"): store.open_input_file(file.path).read() for file in entries if file.is_file}


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """A store that answers until the end of the block; nothing is left of it then."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # else a line for every request
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    url = f"http://{host}:{port}"
    try:
        yield ObjectStore(url, *_only_user(url))
    finally:
        _order(url, "reset-auth", "inf")
        _order(url, "reset")
        server.stop()


def _only_user(url: str) -> tuple[str, str]:
    """Makes the bucket and a user who may do everything, and shuts everybody else out; the user's key and its secret."""
    anybody: dict[str, Any] = {"endpoint_url": url, "region_name": REGION, "aws_access_key_id": "a", "aws_secret_access_key": "b"}
    boto3.client("s3", **anybody).create_bucket(Bucket=BUCKET)
    users = boto3.client("iam", **anybody)
    users.create_user(UserName="user")
    users.put_user_policy(UserName="user", PolicyName="everything", PolicyDocument=_EVERYTHING)
    key = users.create_access_key(UserName="user")["AccessKey"]
    _order(url, "reset-auth", "0")
    return key["AccessKeyId"], key["SecretAccessKey"]


def _order(url: str, what: str, content: str = "") -> None:
    httpx.post(f"{url}/moto-api/{what}", content=content).raise_for_status()
