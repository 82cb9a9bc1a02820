"""Tries on the real folder or bucket what backups will need of it, and says what is missing."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from botocore.exceptions import ClientError

from workers.errors import BackupError, ObjectExists, ObjectNotFound, Permanent
from workers.sections import LocalStoreSettings, S3StoreSettings
from workers.storage import Store, open_store
from workers.storage.s3_client import code_of, open_client, translated
from workers.storage.s3_upload import part_size

GIGABYTE = 1_000_000_000
SMALL = b"0123456789"
SECONDS_OF_SKEW = 60
"""S3 refuses requests whose time is fifteen minutes off."""


@dataclass(frozen=True)
class Check:
    """One thing that was tried: whether it works, and what was found, or what to do."""

    what: str
    ok: bool
    says: str


def check_store(settings: LocalStoreSettings | S3StoreSettings) -> list[Check]:
    """Put, read, list and delete objects below ``preflight/``, and return what works and what does not.

    Raises nothing of the store's: its errors are in the checks. Objects are not locked, and none is left.
    """
    if isinstance(settings, S3StoreSettings):
        unlocked: LocalStoreSettings | S3StoreSettings = settings.model_copy(update={"lock": None})
    else:
        unlocked = settings
    store = open_store(unlocked)
    trial = _Trial(store, f"preflight/{secrets.token_hex(8)}")
    steps: dict[str, Callable[[], str]] = {
        "put": trial.put,
        "ranged get": trial.ranged,
        "list": trial.list,
        "a taken key is refused": trial.taken,
        "an object of several parts": trial.large,
        "clock": trial.clock,
    }
    if isinstance(settings, S3StoreSettings):
        steps["conditional put"] = lambda: _conditional(settings, trial.key)
        if settings.lock:
            steps["object lock"] = lambda: _lock(settings)
    else:
        steps["free space"] = lambda: _space(settings)
    steps["delete"] = trial.delete
    return [_tried(what, step) for what, step in steps.items()]


def _tried(what: str, step: Callable[[], str]) -> Check:
    try:
        return Check(what, ok=True, says=step())
    except (BackupError, OSError) as error:
        return Check(what, ok=False, says=str(error))


class _BrokenOffError(Exception):
    """Ends a put that is to be gone on with."""


@dataclass(frozen=True)
class _Trial:
    store: Store
    key: str

    def put(self) -> str:
        stored = self.store.put(self.key, [SMALL])
        _expect(stored.size == len(SMALL), f"{len(SMALL)} bytes were put, and {stored.size} are there")
        return "works"

    def ranged(self) -> str:
        found = b"".join(self.store.get(self.key, offset=3, length=4))
        _expect(found == SMALL[3:7], f"asked for {SMALL[3:7]!r} it gave {found!r}")
        return "works"

    def list(self) -> str:
        keys = [item.key for item in self.store.list("preflight/")]
        _expect(self.key in keys, "an object that was put is not listed")
        return "works"

    def taken(self) -> str:
        try:
            self.store.put(self.key, [b"other"])
        except ObjectExists:
            return "works"
        raise Permanent("a second object took the place of the first; committed backups could be overwritten")

    def large(self) -> str:
        key, sent = f"{self.key}.large", list[int]()
        whole = bytes(part_size(1)) + SMALL
        digest = hashlib.sha256(whole).hexdigest()

        def breaks_off() -> Iterator[bytes]:
            yield whole
            raise _BrokenOffError

        with contextlib.suppress(_BrokenOffError):
            self.store.put(key, breaks_off(), sha256=digest)
        self.store.put(key, [whole], sha256=digest, sending=sent.append)
        found = b"".join(self.store.get(key, offset=part_size(1)))
        _expect(found == SMALL, "its last part came back otherwise")
        if sum(sent) >= part_size(1):
            return "works; one that breaks off begins anew, since the server does not say what it has of it"
        return "works, and goes on where it broke off"

    def clock(self) -> str:
        # An object is as old as the time since it was put; more, or less than nothing, is between the clocks.
        before = time.time()
        self.store.put(f"{self.key}.clock", [b""])
        skew = self.store.stat(f"{self.key}.clock").modified - before
        _expect(
            abs(skew) < SECONDS_OF_SKEW,
            f"the store's clock differs from this host's by {skew:.0f} s; set one",
        )
        return f"differs by {abs(skew):.0f} s"

    def delete(self) -> str:
        for key in (self.key, f"{self.key}.large", f"{self.key}.clock"):
            self.store.delete(key)
            try:
                self.store.stat(key)
            except ObjectNotFound:
                continue
            raise Permanent(f"{key} is still there after it was deleted; retention could free no space")
        return "works"


def _conditional(settings: S3StoreSettings, key: str) -> str:
    """Put over a key that is taken on the condition that it is free: a server that knows conditions refuses."""
    prefix = f"{settings.prefix}/" if settings.prefix else ""
    try:
        with translated(key):
            open_client(settings).put_object(
                Bucket=settings.bucket, Key=f"{prefix}{key}", Body=SMALL, IfNoneMatch="*"
            )
    except ObjectExists:
        return "works"
    except Permanent as error:
        if isinstance(error.__cause__, ClientError) and code_of(error.__cause__) == "NotImplemented":
            return "not known to this server; keys are looked for before a put, and leases keep writers apart"
        raise
    return "ignored by this server; keys are looked for before a put, and leases keep writers apart"


def _lock(settings: S3StoreSettings) -> str:
    with translated("the bucket's object lock"):
        answer = open_client(settings).get_object_lock_configuration(Bucket=settings.bucket)
    enabled = answer.get("ObjectLockConfiguration", {}).get("ObjectLockEnabled")
    _expect(enabled == "Enabled", "the bucket has no object lock; it is switched on when a bucket is made")
    return "is on"


def _space(settings: LocalStoreSettings) -> str:
    usage = shutil.disk_usage(settings.path)
    _expect(usage.free > GIGABYTE, f"only {usage.free / GIGABYTE:.2f} GB are free at {settings.path}")
    return f"{usage.free / GIGABYTE:.0f} of {usage.total / GIGABYTE:.0f} GB are free"


def _expect(condition: bool, otherwise: str) -> None:  # noqa: FBT001 - reads like an assertion
    if not condition:
        raise Permanent(otherwise)
