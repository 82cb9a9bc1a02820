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

from workers.errors import BackupError, IntegrityError, ObjectNotFound, Permanent
from workers.storage.s3_client import translated

log = logging.getLogger(__name__)
PART = 8 << 20
PARTS_BEFORE_LARGER_ONES = 76
"""So that the 10,000 parts that S3 allows hold the 5 TiB that it allows an object."""
IN_FLIGHT = 4
BYTES_IN_FLIGHT = IN_FLIGHT * PART


def part_size(number: int) -> int:
    """Return the size of the part ``number``, from 1: 8 MiB, and 8 MiB more every 76 parts.

    An object of 5 GB has parts of up to 64 MiB, one of 100 GB of 136 MiB; memory holds a few of them.
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
    def arguments(self) -> dict[str, str]:
        encoded = b64encode(self.digest).decode()
        if self.kind == "sha256":
            return {"ChecksumAlgorithm": "SHA256", "ChecksumSHA256": encoded}
        return {"ContentMD5": encoded}

    def compare(self, response: Mapping[str, Any], what: str) -> None:
        """Compare with what the server says it has. Raises ``IntegrityError``, ``Permanent`` if it does not say."""
        if self.kind == "sha256":
            if "ChecksumSHA256" not in response:
                raise Permanent(
                    f'the server of the store ignores SHA-256 checksums, at {what}; set checksums = "md5"'
                )
            differs = response["ChecksumSHA256"] != b64encode(self.digest).decode()
        else:
            etag = response.get("ETag", "").strip('"')
            # With keys of its own, and on some servers always, the ETag is no MD5; then the server's check must do.
            is_digest = len(etag) == 2 * len(self.digest) and "SSEKMSKeyId" not in response
            differs = is_digest and etag != self.digest.hex()
        if differs:
            raise IntegrityError(f"the store has other bytes than were sent, at {what}")


class Multipart:
    """One multipart upload: parts are sent beside the source, a few at a time, and nothing shows before `complete`."""

    def __init__(
        self, client: Any, where: Mapping[str, Any], key: str, kind: Literal["sha256", "md5"]
    ) -> None:
        self._client, self._where, self._key, self._kind = client, dict(where), key, kind
        self._sent: list[Future[dict[str, Any]]] = []
        self._flying: deque[tuple[Future[dict[str, Any]], int]] = deque()
        self.size = 0

    @contextlib.contextmanager
    def begun(self, properties: Mapping[str, Any]) -> Iterator[None]:
        """Begin the upload; it is aborted, with all its parts, when the block raises."""
        algorithm = {"ChecksumAlgorithm": "SHA256"} if self._kind == "sha256" else {}
        with translated(self._key):
            upload = self._client.create_multipart_upload(**self._where, **properties, **algorithm)
        self._where["UploadId"] = upload["UploadId"]
        self._pool = ThreadPoolExecutor(max_workers=IN_FLIGHT, thread_name_prefix="upload")
        try:
            yield
        except BaseException:
            self._pool.shutdown(cancel_futures=True)  # a part that arrives after the abort would stay
            self._abort()
            raise
        self._pool.shutdown()

    def send(self, part: bytearray) -> None:
        """Send a part, after waiting until memory allows another; raises what an earlier part raised."""
        while self._flying and sum(size for _, size in self._flying) + len(part) > BYTES_IN_FLIGHT:
            self._flying.popleft()[0].result()
        self.size += len(part)
        future = self._pool.submit(self._upload, len(self._sent) + 1, part)
        self._sent.append(future)
        self._flying.append((future, len(part)))

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
        known = {"ChecksumSHA256": response["ChecksumSHA256"]} if self._kind == "sha256" else {}
        return {"PartNumber": number, "ETag": response["ETag"], **known}

    def _abort(self) -> None:
        try:
            with contextlib.suppress(ObjectNotFound), translated(self._key):
                self._client.abort_multipart_upload(**self._where)
        except BackupError as error:  # what made it fail goes on to the caller; a later put aborts this
            log.warning("the unfinished upload of %s stays for now: %s", self._key, error)
