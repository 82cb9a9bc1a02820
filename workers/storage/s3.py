"""A store in a bucket of S3, or of a server that speaks its protocol."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from typing import Any

from botocore.exceptions import ClientError

from workers.errors import (
    IntegrityError,
    ObjectExists,
    ObjectNotFound,
    Permanent,
    StoreUnavailable,
)
from workers.sections import LockSettings, S3StoreSettings
from workers.storage import Sending, StoredObject, at_once, check_key
from workers.storage.s3_client import BROKEN, code_of, open_client, translated
from workers.storage.s3_upload import Checksum, Multipart, listed_parts, part_size, parts_of, uploads

CHUNK = 1 << 20
LONGEST_PAUSE = 20
WRITER = "writer"
"""Metadata of an object: a word of its writer's own, by which it knows its object after an answer that got lost."""


class S3Store:
    """Objects below the prefix of a bucket.

    A put sends up to 8 MiB as one request, more as a multipart upload, and commits on the condition that the key is
    free; a server without conditional puts is asked just before. Every request carries a checksum that the server
    checks and reports. Uploads of killed writers show nowhere; a put of the same content goes on with them, and they are
    aborted by a later put, or a prune, when they are old.
    """

    def __init__(self, settings: S3StoreSettings) -> None:
        self.settings = settings

    def put(
        self, key: str, chunks: Iterable[bytes], *, sha256: str | None = None, sending: Sending = at_once
    ) -> StoredObject:
        self._refuse_taken(key)
        writer = sha256 or secrets.token_hex(16)
        parts = parts_of(chunks)
        first = next(parts, bytearray())
        if len(first) < part_size(1):
            sending(len(first))
            return self._put_whole(key, first, writer)
        folder, _, below = key.partition("/")
        self._abort_abandoned(f"{folder}/" if below else "")
        upload = Multipart(self._client, self._where(key), key, self.settings.checksums, sending)
        goes_on = sha256 is not None and upload.find(first)
        with upload.begun(self._properties(writer), stays=sha256 is not None):
            upload.send(first)
            for part in parts:
                upload.send(part)
            upload.wait()
            self._commit(key, writer, upload.complete)
        if goes_on and self.settings.lock:  # the upload has the lock of when it was begun, or none
            self._lock(key, self.settings.lock)
        return self._committed(key, writer, upload.size)

    def get(self, key: str, *, offset: int = 0, length: int | None = None) -> Iterator[bytes]:
        where, end = self._where(key), None if length is None else offset + length
        if length == 0:
            self.stat(key)
            return
        position, etag, failures = offset, "", 0
        while end is None or position < end:
            response = self._open(key, where, (position, end), etag)
            if response is None:
                return  # the object ends before the range begins
            etag, body = response["ETag"], response["Body"]
            try:
                with contextlib.closing(body):
                    while chunk := body.read(CHUNK):
                        position, failures = position + len(chunk), 0
                        yield chunk
                return
            except BROKEN as error:
                failures += 1
                if failures == self.settings.attempts:
                    raise StoreUnavailable(f"the store failed at {key}, byte {position}: {error}") from error
                time.sleep(min(2**failures / 4, LONGEST_PAUSE))

    def stat(self, key: str) -> StoredObject:
        return _stored(key, self._head(key))

    def list(self, prefix: str) -> Iterator[StoredObject]:
        if "\0" in prefix:
            return  # no key is like this
        pages = self._client.get_paginator("list_objects_v2")
        start = self._name(prefix)
        with translated(prefix):
            for page in pages.paginate(Bucket=self.settings.bucket, Prefix=start):
                for item in page.get("Contents", ()):
                    yield StoredObject(
                        item["Key"].removeprefix(self._name("")),
                        item["Size"],
                        _seconds(item["LastModified"]),
                    )

    def delete(self, key: str) -> None:
        where = self._where(key)
        with contextlib.suppress(ObjectNotFound), translated(key):
            self._client.delete_object(**where)

    @property
    def _client(self) -> Any:
        return open_client(self.settings)

    def _name(self, key: str) -> str:
        return f"{self.settings.prefix}/{key}" if self.settings.prefix else key

    def _where(self, key: str) -> dict[str, Any]:
        return {"Bucket": self.settings.bucket, "Key": self._name(check_key(key))}

    def _properties(self, writer: str) -> dict[str, Any]:
        """What an object gets beside its bytes."""
        properties: dict[str, Any] = {"Metadata": {WRITER: writer}}
        if self.settings.storage_class:
            properties["StorageClass"] = self.settings.storage_class
        if lock := self.settings.lock:
            properties["ObjectLockMode"] = lock.mode.upper()
            properties["ObjectLockRetainUntilDate"] = datetime.now(UTC) + timedelta(days=lock.days)
        return properties

    def _lock(self, key: str, lock: LockSettings) -> None:
        retention = {
            "Mode": lock.mode.upper(),
            "RetainUntilDate": datetime.now(UTC) + timedelta(days=lock.days),
        }
        with translated(f"the lock of {key}"):
            self._client.put_object_retention(**self._where(key), Retention=retention)

    def _put_whole(self, key: str, data: bytearray, writer: str) -> StoredObject:
        checksum = Checksum.of(data, self.settings.checksums)
        arguments = {**self._where(key), **self._properties(writer), **checksum.arguments}
        responses: list[dict[str, Any]] = []
        self._commit(
            key,
            writer,
            lambda condition: responses.append(self._client.put_object(Body=data, **arguments, **condition)),
        )
        try:
            for response in responses:  # none when the answer got lost
                checksum.compare(response, key)
        except Permanent:
            self.delete(key)
            raise
        return self._committed(key, writer, len(data))

    def _commit(self, key: str, writer: str, call: Callable[[dict[str, Any]], None]) -> None:
        """Let ``call`` make the object appear, unless the key was taken meanwhile."""
        self._refuse_taken(key)
        try:
            with translated(key):
                try:
                    call({"IfNoneMatch": "*"})
                except ClientError as error:
                    if code_of(error) != "NotImplemented":
                        raise
                    call({})
        except (ObjectExists, ObjectNotFound, StoreUnavailable):
            # An answer that got lost makes botocore ask again, and then the key is taken by this very object.
            if self._writer_of(key) != writer:
                raise

    def _refuse_taken(self, key: str) -> None:
        with contextlib.suppress(ObjectNotFound):
            self._head(key)
            raise ObjectExists(f"{key} is already in the store, in bucket {self.settings.bucket}")

    def _writer_of(self, key: str) -> str | None:
        try:
            writer: str | None = self._head(key)["Metadata"].get(WRITER)
        except ObjectNotFound:
            return None
        return writer

    def _committed(self, key: str, writer: str, size: int) -> StoredObject:
        """Describe what was just committed, as the server has it."""
        head = self._head(key)
        if head["Metadata"].get(WRITER) != writer:  # on a server without conditional puts
            raise ObjectExists(f"{key} was put by somebody else at the same time")
        if head["ContentLength"] != size:
            self.delete(key)
            raise IntegrityError(f"{key} has {head['ContentLength']} bytes in the store; {size} were sent")
        return _stored(key, head)

    def _open(
        self, key: str, where: dict[str, Any], wanted: tuple[int, int | None], etag: str
    ) -> dict[str, Any] | None:
        """Begin to read the bytes from the first position to before the second, ``None`` if there are none.

        With an ``etag`` it must still be the same object; raises ``IntegrityError`` if not.
        """
        start, end = wanted
        condition = {"IfMatch": etag} if etag else {}
        if ranged := start > 0 or end is not None:
            condition["Range"] = f"bytes={start}-{'' if end is None else end - 1}"
        try:
            with translated(key):
                response = dict(self._client.get_object(**where, **condition))
        except ObjectExists as error:
            raise IntegrityError(f"{key} was replaced while it was read") from error
        except Permanent as error:
            if isinstance(error.__cause__, ClientError) and code_of(error.__cause__) in (
                "InvalidRange",
                "416",
            ):
                return None
            raise
        if ranged and response["ResponseMetadata"]["HTTPStatusCode"] != HTTPStatus.PARTIAL_CONTENT:
            raise Permanent(f"the server of the store does not do ranged reads, at {key}")
        return response

    def _head(self, key: str) -> dict[str, Any]:
        where = self._where(key)
        with translated(key):
            return dict(self._client.head_object(**where))

    def remove_unfinished(self) -> Sequence[str]:
        return self._abort_abandoned("")

    def _abort_abandoned(self, prefix: str) -> Sequence[str]:
        """Abort the uploads to which nobody has added for longer than any writer takes, and return their keys."""
        aborted, bucket = [], self.settings.bucket
        before = datetime.now(UTC) - timedelta(hours=self.settings.unfinished_hours)
        with translated(prefix or "its unfinished uploads"):
            for upload in uploads(self._client, {"Bucket": bucket, "Prefix": self._name(prefix)}):
                where = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
                with contextlib.suppress(self._client.exceptions.NoSuchUpload):
                    if upload["Initiated"] < before and all(
                        part["LastModified"] < before for part in listed_parts(self._client, where)
                    ):
                        self._client.abort_multipart_upload(**where)
                        aborted.append(upload["Key"].removeprefix(self._name("")))
        return aborted


def _stored(key: str, head: dict[str, Any]) -> StoredObject:
    return StoredObject(key, head["ContentLength"], _seconds(head["LastModified"]))


def _seconds(moment: datetime) -> float:
    """Return whole seconds since the epoch: listings and headers differ in what they say of fractions."""
    return float(int(moment.timestamp()))
