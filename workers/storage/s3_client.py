"""The connection to an S3 server, and its errors in this system's words."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from http import HTTPStatus
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionError,  # noqa: A004 - botocore's own
    HTTPClientError,
    IncompleteReadError,
    MetadataRetrievalError,
)

from workers.errors import ObjectExists, ObjectNotFound, Permanent, StoreUnavailable
from workers.sections import S3StoreSettings

CONNECTIONS = 32
UNAVAILABLE = (ConnectionError, HTTPClientError, MetadataRetrievalError)
BROKEN = (*UNAVAILABLE, IncompleteReadError)
"""What reading a body raises when the connection breaks."""
DAMAGED_ON_THE_WAY = ("BadDigest", "XAmzContentSHA256Mismatch", "IncompleteBody")
NOW_TOO_MUCH = ("SlowDown", "RequestTimeout", "Throttling", "ThrottlingException", "OperationAborted")
HINTS = {
    "NoSuchBucket": "create the bucket, or name another in the settings",
    "RequestTimeTooSkewed": "this host's clock is wrong; set it",
    "InvalidStorageClass": "the server does not know the storage_class of the settings",
    "AccessDenied": "the credentials do not allow it",
    "PermanentRedirect": "the bucket is in another region; set `region`",
}


def open_client(settings: S3StoreSettings) -> Any:
    """Return a client of the server: one for all threads of a process, and for all prefixes."""
    return _client(settings.model_copy(update={"prefix": ""}), os.getpid())


@functools.lru_cache(maxsize=8)
def _client(settings: S3StoreSettings, _pid: int) -> Any:
    # A connection must not cross a fork: the process id is part of the key.
    key, secret = settings.access_key_id, settings.secret_access_key
    try:
        session = boto3.session.Session(
            aws_access_key_id=key.resolve() if key else None,
            aws_secret_access_key=secret.resolve() if secret else None,
            region_name=settings.region,
        )
        return session.client(
            "s3",
            endpoint_url=str(settings.endpoint) if settings.endpoint else None,
            config=Config(
                retries={"mode": "standard", "total_max_attempts": settings.attempts},
                s3={"addressing_style": "path" if settings.path_style else "auto"},
                max_pool_connections=CONNECTIONS,
                connect_timeout=10,
                # Every upload carries a checksum made here; those that boto3 adds by itself come as trailers, which
                # many S3-compatible servers refuse.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
            ),
        )
    except (BotoCoreError, ValueError) as error:  # no region, a profile that does not exist
        raise Permanent(
            f"the settings of the store in bucket {settings.bucket} do not do: {error}"
        ) from error


@contextlib.contextmanager
def translated(what: str) -> Iterator[None]:
    """Turn botocore's errors at ``what``, a key or a prefix, into ours."""
    try:
        yield
    except ClientError as error:
        raise _translation(error, what) from error
    except UNAVAILABLE as error:
        raise StoreUnavailable(f"the store does not answer for {what}: {error}") from error
    except BotoCoreError as error:
        raise Permanent(f"the store cannot be asked for {what}: {error}") from error


def code_of(error: ClientError) -> str:
    """Return the server's word for an error, for example ``NoSuchKey``; ``404`` where it had no body."""
    return str(error.response.get("Error", {}).get("Code", ""))


def _translation(error: ClientError, what: str) -> Exception:
    code = code_of(error)
    answer: Any = error.response.get("ResponseMetadata", {})
    status = int(answer.get("HTTPStatusCode", 0))
    said = f"{code or status}: {error.response.get('Error', {}).get('Message', '')}"
    if code in ("NoSuchKey", "NoSuchUpload", "404", "NotFound"):
        return ObjectNotFound(f"the store has no object {what}")
    if status in (HTTPStatus.PRECONDITION_FAILED, HTTPStatus.CONFLICT) and code != "OperationAborted":
        return ObjectExists(f"{what} is already in the store")
    if (
        code in (*DAMAGED_ON_THE_WAY, *NOW_TOO_MUCH)
        or status == HTTPStatus.TOO_MANY_REQUESTS
        or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status != HTTPStatus.NOT_IMPLEMENTED)
    ):
        return StoreUnavailable(f"the store failed at {what}: {said}")
    hint = HINTS.get(code)
    return Permanent(f"the store refuses {what}: {said}{f' ({hint})' if hint else ''}")
