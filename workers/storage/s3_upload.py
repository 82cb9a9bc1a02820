"""Multipart uploads from memory, and the checksums by which a server and this system agree on every byte."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from workers.errors import BackupError, IntegrityError, ObjectNotFound, Permanent, can_go_on
from workers.storage import Sending
from workers.storage.s3_client import translated

log = logging.getLogger(__name__)
PART = 8 << 20
PARTS_BEFORE_LARGER_ONES = 76
"""So that the 10,000 parts that S3 allows hold the 5 TiB that it allows an object."""
IN_FLIGHT = 4
BYTES_IN_FLIGHT = IN_FLIGHT * PART


def part_size(number: int) -> int:
    """Return the size of the part ``number``, from 1: 8 MiB, and 8 MiB more every 76 parts.

    How long a stream will be is not known when its first part is sent. The last parts of 5 GB have 32 MiB, of 100 GB
    144 MiB, of 1 TB 448 MiB. An upload's memory is about three times that, and never less than some 50 MiB: one part
    that is filled, one on its way, and botocore's copy of it.
    """
    return PART * (1 + (number - 1) // PARTS_BEFORE_LARGER_ONES)


def parts_of(chunks: Iterable[bytes]) -> Iterator[bytearray]:
    """Yield the bytes of ``chunks`` as parts of `part_size`; only the last one may be smaller, and none is empty."""
    number, part = 1, bytearray()
    for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            taken = rest[: part_size(number) - len(part)]
            part += taken
            rest = rest[len(taken) :]
            if len(part) == part_size(number):
                yield part
                number, part = number + 1, bytearray()
    if part:
        yield part


@dataclass(frozen=True)
class Checksum:
    """What a server checks one request's bytes by, and reports back."""

    kind: Literal["sha256", "md5"]
    digest: bytes

    @classmethod
    def of(cls, data: bytearray, kind: Literal["sha256", "md5"]) -> Checksum:
        return cls(kind, hashlib.new(kind, data, usedforsecurity=False).digest())

    @property
    def encoded(self) -> str:
        return b64encode(self.digest).decode()

    @property
    def arguments(self) -> dict[str, str]:
        if self.kind == "sha256":
            return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": self.encoded}
        return {"ContentMD5": self.encoded}

    def compare(self, response: Mapping[str, Any], what: str) -> None:
        """Compare with what the server says it has. Raises ``IntegrityError``, ``Permanent`` if it does not say."""
        if self.kind == "sha256":
            if "ChecksumSHA256" not in response:
                raise Permanent(
                    f'the server of the store ignores SHA-256 checksums, at {what}; set checksums = "md5"'
                )
            differs = response["ChecksumSHA256"] != self.encoded
        else:
            etag = response.get("ETag", "").strip('"')
            # With keys of its own, and on some servers always, the ETag is no MD5; then the server's check must do.
            is_digest = len(etag) == 2 * len(self.digest) and "SSEKMSKeyId" not in response
            differs = is_digest and etag != self.digest.hex()
        if differs:
            raise IntegrityError(f"the store has other bytes than were sent, at {what}")


def is_same(part: bytearray, listed: Mapping[str, Any]) -> bool:
    """Whether a part that has arrived, as the server lists it, is ``part``; ``False`` where that cannot be told."""
    if listed["Size"] != len(part):
        return False
    if "ChecksumSHA256" in listed:
        return bool(listed["ChecksumSHA256"] == Checksum.of(part, "sha256").encoded)
    return bool(listed["ETag"].strip('"') == Checksum.of(part, "md5").digest.hex())


def uploads(client: Any, where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the uploads below a ``Prefix`` of a ``Bucket`` that were neither completed nor aborted."""
    for page in client.get_paginator("list_multipart_uploads").paginate(**where):
        yield from page.get("Uploads", ())


def listed_parts(client: Any, where: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the parts of one upload that have arrived."""
    for page in client.get_paginator("list_parts").paginate(**where):
        yield from page.get("Parts", ())


class Multipart:
    """One multipart upload: parts are sent beside the source, a few at a time, and nothing shows before `complete`."""

    def __init__(
        self,
        client: Any,
        where: Mapping[str, Any],
        key: str,
        kind: Literal["sha256", "md5"],
        sending: Sending,
    ) -> None:
        self._client, self._where, self._key, self._kind = client, dict(where), key, kind
        self._sending = sending
        self._there: dict[int, dict[str, Any]] = {}
        self._sent: list[Future[dict[str, Any]]] = []
        self._flying: deque[tuple[Future[dict[str, Any]], int]] = deque()
        self.size = 0

    def find(self, first: bytearray) -> bool:
        """Go on with an earlier upload to the same key whose first part is ``first``, if there is one."""
        place = {"Bucket": self._where["Bucket"], "Prefix": self._where["Key"]}
        with translated(self._key):
            for upload in uploads(self._client, place):
                where = {**self._where, "UploadId": upload["UploadId"]}
                with contextlib.suppress(self._client.exceptions.NoSuchUpload):  # ended just now
                    if upload["Key"] != self._where["Key"]:
                        continue
                    there = {part["PartNumber"]: part for part in listed_parts(self._client, where)}
                    if 1 in there and is_same(first, there[1]):
                        self._where, self._there = where, there
                        return True
        return False

    @contextlib.contextmanager
    def begun(self, properties: Mapping[str, Any], *, stays: bool) -> Iterator[None]:
        """Begin the upload unless one was found. It is aborted, with all its parts, when the block raises.

        One that ``stays`` is left instead where a later put can go on with it.
        """
        if "UploadId" not in self._where:
            algorithm = {"ChecksumAlgorithm": "SHA256"} if self._kind == "sha256" else {}
            with translated(self._key):
                upload = self._client.create_multipart_upload(**self._where, **properties, **algorithm)
            self._where["UploadId"] = upload["UploadId"]
        self._pool = ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="upload")
        try:
            yield
        except BaseException as error:
            left = stays and can_go_on(error)
            self._pool.shutdown(cancel_futures=not left)  # a part that arrives after the abort would stay
            if not left:
                self._abort()
            raise
        self._pool.shutdown()

    def send(self, part: bytearray) -> None:
        """Send a part unless it is there, after waiting until memory allows another; raises what an earlier part raised."""
        number = len(self._sent) + 1
        self.size += len(part)
        if (there := self._there.get(number)) and is_same(part, there):
            future: Future[dict[str, Any]] = Future()
            future.set_result(self._record(number, there["ETag"], Checksum.of(part, self._kind)))
        else:
            while self._flying and sum(size for _, size in self._flying) + len(part) > BYTES_IN_FLIGHT:
                self._flying.popleft()[0].result()
            self._sending(len(part))
            future = self._pool.submit(self._upload, number, part)
            self._flying.append((future, len(part)))
        self._sent.append(future)

    def wait(self) -> None:
        """Wait until every part has arrived."""
        for future in self._sent:
            future.result()

    def complete(self, condition: Mapping[str, Any]) -> None:
        """Make the object appear."""
        parts = [future.result() for future in self._sent]
        self._client.complete_multipart_upload(
            **self._where,
            MultipartUpload={"Parts": parts},
            **condition,
        )

    def _upload(self, number: int, data: bytearray) -> dict[str, Any]:
        checksum = Checksum.of(data, self._kind)
        with translated(self._key):
            response = self._client.upload_part(
                **self._where, PartNumber=number, Body=data, **checksum.arguments
            )
        checksum.compare(response, f"part {number} of {self._key}")
        return self._record(number, response["ETag"], checksum)

    def _record(self, number: int, etag: str, checksum: Checksum) -> dict[str, Any]:
        known = {"ChecksumSHA256": checksum.encoded} if self._kind == "sha256" else {}
        return {"PartNumber": number, "ETag": etag, **known}

    def _abort(self) -> None:
        try:
            with contextlib.suppress(ObjectNotFound), translated(self._key):
                self._client.abort_multipart_upload(**self._where)
        except BackupError as error:  # what made it fail goes on to the caller; a later put aborts this
            log.warning("the unfinished upload of %s stays for now: %s", self._key, error)
