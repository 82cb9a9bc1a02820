"""What the S3 store promises beyond `tests/contracts/test_store.py`: parts, aborts, lost answers, damage, preflight."""

from __future__ import annotations

import bisect
import itertools
import socket
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import ClientError, HTTPClientError
from botocore.response import StreamingBody

from tests.s3_servers import S3Server, moto_server
from workers.errors import IntegrityError, ObjectExists, ObjectNotFound, Permanent, StoreUnavailable
from workers.sections import LocalStoreSettings, LockSettings, S3StoreSettings
from workers.storage import remove_unfinished, s3_client
from workers.storage.preflight import check_store
from workers.storage.s3 import S3Store
from workers.storage.s3_upload import part_size, parts_of

MEBIBYTE = 1 << 20
LARGE = 20 * MEBIBYTE


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_server(tmp_path_factory.mktemp("moto")) as running:
        yield running


@pytest.fixture
def settings(server: S3Server) -> S3StoreSettings:
    return server.store()


def noise(size: int = LARGE) -> Iterator[bytes]:
    for number in range(size // MEBIBYTE):
        yield bytes([number]) * MEBIBYTE


def faulty(monkeypatch: pytest.MonkeyPatch, settings: S3StoreSettings, method: str, fault: Any) -> Any:
    """Let ``fault`` stand for a method of the store's client; it is called with the real one first."""
    client = s3_client.open_client(settings)
    real = getattr(client, method)
    monkeypatch.setattr(client, method, lambda **arguments: fault(real, **arguments))
    return real


def test_parts_grow_so_that_ten_thousand_hold_the_largest_object_and_none_is_too_large() -> None:
    sizes = [part_size(number) for number in range(1, 10_001)]
    assert sum(sizes) >= 5 << 40
    assert sizes == sorted(sizes)
    assert (min(sizes), max(sizes) <= 5 << 30) == (8 * MEBIBYTE, True)
    reached = list(itertools.accumulate(sizes))
    for stored, last in ((5_000_000_000, 32), (100_000_000_000, 144), (1_000_000_000_000, 448)):
        assert sizes[bisect.bisect_left(reached, stored)] == last * MEBIBYTE


@pytest.mark.parametrize("size", [0, 1, 8 * MEBIBYTE, 8 * MEBIBYTE + 1])
def test_parts_are_the_bytes_in_order_and_only_the_last_is_smaller(size: int) -> None:
    parts = list(parts_of([bytes(size // 3), b"", bytes(size - size // 3)]))
    assert b"".join(parts) == bytes(size)
    assert [len(part) for part in parts[:-1]] == [8 * MEBIBYTE] * (len(parts) - 1)
    assert all(parts)


def test_memory_does_not_grow_with_the_object(settings: S3StoreSettings) -> None:
    store = S3Store(settings)
    store.put("warm", noise(9 * MEBIBYTE))
    assert peak_of(store, "a") < 56 * MEBIBYTE


def test_memory_is_about_three_parts_where_parts_are_large(
    settings: S3StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parts of 32 MiB, as at 5 GB; at 100 GB, they have 144 MiB."""
    for module in ("s3", "s3_upload"):
        monkeypatch.setattr(f"workers.storage.{module}.part_size", lambda _number: 32 * MEBIBYTE)
    assert peak_of(S3Store(settings), "a") < 3.5 * 32 * MEBIBYTE


def peak_of(store: S3Store, key: str) -> int:
    """Return the bytes of memory that a put of 96 MiB takes at most."""
    tracemalloc.start()
    store.put(key, noise(96 * MEBIBYTE))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt()])
def test_a_large_source_that_raises_leaves_no_parts(
    server: S3Server, settings: S3StoreSettings, error: BaseException
) -> None:
    def source() -> Iterator[bytes]:
        yield from noise()
        assert server.everything(settings) == ["shop/" + settings.prefix.split("/")[1] + "/a/b"]
        raise error

    with pytest.raises(type(error)) as raised:
        S3Store(settings).put("a/b", source())
    assert raised.value is error
    assert server.everything(settings) == []


@pytest.mark.parametrize("method", ["upload_part", "complete_multipart_upload", "put_object"])
def test_a_request_that_fails_for_good_leaves_nothing(
    server: S3Server, settings: S3StoreSettings, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fault(_real: Any, **_arguments: Any) -> None:
        with s3_client.translated("a"):
            raise HTTPClientError(error="the line is down")

    faulty(monkeypatch, settings, method, fault)
    with pytest.raises(StoreUnavailable, match="the line is down"):
        S3Store(settings).put("a", [b"small"] if method == "put_object" else noise())
    assert server.everything(settings) == []


@pytest.mark.parametrize("method", ["complete_multipart_upload", "put_object"])
def test_a_commit_whose_answer_got_lost_is_known_by_its_writer(
    settings: S3StoreSettings, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    def fault(real: Any, **arguments: Any) -> Any:
        real(**arguments)
        return real(**arguments)  # as botocore does when no answer came

    faulty(monkeypatch, settings, method, fault)
    content = [b"small"] if method == "put_object" else list(noise())
    assert S3Store(settings).put("a", content).size == sum(map(len, content))
    assert b"".join(S3Store(settings).get("a")) == b"".join(content)


def test_a_key_that_was_taken_while_the_source_was_read_is_refused(
    server: S3Server, settings: S3StoreSettings
) -> None:
    def source() -> Iterator[bytes]:
        yield from noise()
        S3Store(settings).put("a", [b"first"])

    with pytest.raises(ObjectExists):
        S3Store(settings).put("a", source())
    assert b"".join(S3Store(settings).get("a")) == b"first"
    assert len(server.everything(settings)) == 1


@pytest.mark.parametrize("checksums", ["sha256", "md5"])
@pytest.mark.parametrize("method", ["upload_part", "put_object"])
def test_bytes_that_changed_on_the_way_are_not_taken(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, method: str, checksums: str
) -> None:
    settings = server.store(checksums=checksums)

    def fault(real: Any, **arguments: Any) -> Any:
        body = bytearray(arguments.pop("Body"))
        body[0] ^= 1
        # Moto checks nothing itself: it is what it says it has that differs.
        for name in ("ChecksumSHA256", "ContentMD5"):
            arguments.pop(name, None)
        return real(Body=bytes(body), **arguments)

    faulty(monkeypatch, settings, method, fault)
    with pytest.raises(IntegrityError, match="other bytes than were sent"):
        S3Store(settings).put("a", [b"small"] if method == "put_object" else noise())
    assert server.everything(settings) == []


def test_uploads_of_killed_writers_are_aborted_when_they_are_old(server: S3Server) -> None:
    # Moto says of every upload that it began in 2010.
    patient, hasty = server.store(unfinished_hours=24 * 366 * 50), server.store(unfinished_hours=48)
    for settings in (patient, hasty):
        name = f"{settings.prefix}/parts/run/a"
        server.client.create_multipart_upload(Bucket=settings.bucket, Key=name)
        S3Store(settings).put("parts/other/b", noise(9 * MEBIBYTE))
    assert server.everything(patient) == [f"{patient.prefix}/parts/{key}" for key in ("other/b", "run/a")]
    assert server.everything(hasty) == [f"{hasty.prefix}/parts/other/b"]


def test_an_upload_to_which_somebody_adds_is_not_old_and_those_that_are_end_by_a_prune(
    server: S3Server,
) -> None:
    settings = server.store(unfinished_hours=48)
    where = {"Bucket": settings.bucket, "Key": f"{settings.prefix}/full_system/a"}
    upload = server.client.create_multipart_upload(**where)["UploadId"]
    server.client.upload_part(**where, UploadId=upload, PartNumber=1, Body=b"just now")
    assert remove_unfinished(settings) == []
    assert len(server.everything(settings)) == 1

    assert remove_unfinished(settings.model_copy(update={"unfinished_hours": 1e-9})) == ["full_system/a"]
    assert server.everything(settings) == []


def test_what_was_gone_on_with_is_locked_from_its_end_on(server: S3Server) -> None:
    """The upload may be days old, or older than the lock in the settings."""
    server.client.create_bucket(Bucket="going-on", ObjectLockEnabledForBucket=True)
    settings = server.store(bucket="going-on")

    def source() -> Iterator[bytes]:
        yield from noise()
        raise StoreUnavailable("away")

    with pytest.raises(StoreUnavailable):
        S3Store(settings).put("a", source(), sha256="f")
    lock = LockSettings(mode="governance", days=3)
    S3Store(settings.model_copy(update={"lock": lock})).put("a", noise(), sha256="f")

    head = server.client.head_object(Bucket="going-on", Key=f"{settings.prefix}/a")
    days = (head["ObjectLockRetainUntilDate"] - head["LastModified"]).total_seconds() / 86400
    assert (head["ObjectLockMode"], days) == ("GOVERNANCE", pytest.approx(3, abs=0.01))


class Breaking(StreamingBody):
    """A body whose connection breaks after each chunk."""

    def __init__(self, body: Any) -> None:
        super().__init__(body, 0)
        self._body, self._reads = body, 0

    def read(self, amt: int | None = None) -> bytes:
        self._reads += 1
        if self._reads == 2:
            raise HTTPClientError(error="broken")
        return bytes(self._body.read(amt))


def test_a_get_that_breaks_goes_on_where_it_was(
    settings: S3StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, ranges = S3Store(settings), list[str]()
    monkeypatch.setattr("workers.storage.s3.time.sleep", lambda _seconds: None)
    store.put("a", noise(3 * MEBIBYTE))

    def fault(real: Any, **arguments: Any) -> Any:
        ranges.append(arguments.get("Range", ""))
        response = real(**arguments)
        return {**response, "Body": Breaking(response["Body"])}

    faulty(monkeypatch, settings, "get_object", fault)
    assert b"".join(store.get("a")) == b"".join(noise(3 * MEBIBYTE))
    assert ranges == ["", *(f"bytes={number * MEBIBYTE}-" for number in (1, 2, 3))]


def test_a_get_of_what_was_replaced_meanwhile_is_refused(
    settings: S3StoreSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = S3Store(settings)
    monkeypatch.setattr("workers.storage.s3.time.sleep", lambda _seconds: None)
    store.put("a", noise(3 * MEBIBYTE))

    def fault(real: Any, **arguments: Any) -> Any:
        response = real(**arguments)
        return {**response, "Body": Breaking(response["Body"])}

    faulty(monkeypatch, settings, "get_object", fault)
    chunks = store.get("a")
    next(chunks)
    store.delete("a")
    store.put("a", noise(4 * MEBIBYTE))
    with pytest.raises(IntegrityError, match="replaced while it was read"):
        list(chunks)


@pytest.mark.parametrize("method", ["put_object", "create_multipart_upload"])
def test_the_storage_class_and_the_lock_go_with_every_object(
    server: S3Server, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    bucket = method.replace("_", "-")
    server.client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    lock = {"mode": "governance", "days": 2}
    settings = server.store(bucket=bucket, storage_class="STANDARD_IA", lock=lock)
    sent: dict[str, Any] = {}

    def look(real: Any, **arguments: Any) -> Any:
        sent.update(arguments)  # moto forgets the lock of a multipart upload
        return real(**arguments)

    faulty(monkeypatch, settings, method, look)
    S3Store(settings).put("a", [b"1"] if method == "put_object" else noise(9 * MEBIBYTE))

    head = server.client.head_object(Bucket=bucket, Key=f"{settings.prefix}/a")
    assert (head["StorageClass"], sent["ObjectLockMode"]) == ("STANDARD_IA", "GOVERNANCE")
    days = (sent["ObjectLockRetainUntilDate"] - head["LastModified"]).total_seconds() / 86400
    assert days == pytest.approx(2, abs=0.01)
    if method == "put_object":
        version = head["VersionId"]
        with pytest.raises(ClientError, match="AccessDenied"):
            server.client.delete_object(Bucket=bucket, Key=f"{settings.prefix}/a", VersionId=version)


def test_errors_say_what_to_do_and_whether_to_try_again(server: S3Server, settings: S3StoreSettings) -> None:
    with pytest.raises(Permanent, match="create the bucket") as absent:
        S3Store(settings.model_copy(update={"bucket": "absent"})).put("a", [b"1"])
    assert not isinstance(absent.value, ObjectNotFound)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        endpoint = f"http://127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(StoreUnavailable, match="does not answer for a"):
            S3Store(server.store(endpoint=endpoint, attempts=1)).stat("a")


def test_preflight_of_a_bucket_finds_what_works_and_leaves_nothing(
    server: S3Server, settings: S3StoreSettings
) -> None:
    checks = {check.what: check for check in check_store(settings)}
    assert [check for check in checks.values() if not check.ok] == []
    assert checks["conditional put"].says == "works"
    assert checks["an object of several parts"].says == "works, and goes on where it broke off"
    assert server.everything(settings) == []

    missing = check_store(settings.model_copy(update={"bucket": "absent"}))
    assert all(not check.ok for check in missing if check.what in ("put", "list"))
    lock = server.store(lock={"mode": "governance", "days": 1})
    assert [check.what for check in check_store(lock) if not check.ok] == ["object lock"]


def test_preflight_of_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = LocalStoreSettings(path=tmp_path / "store")
    assert [check for check in check_store(settings) if not check.ok] == []
    assert [path for path in (tmp_path / "store").rglob("*") if path.is_file()] == []

    monkeypatch.setattr("workers.storage.preflight.GIGABYTE", 1 << 60)
    monkeypatch.setattr("workers.storage.preflight.time.time", lambda: 1_000_000_000.0)
    assert [check.what for check in check_store(settings) if not check.ok] == ["clock", "free space"]
