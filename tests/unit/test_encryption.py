"""age as a stream: what one key of many opens is what went in, damage is seen, nothing hangs and no key is shown."""

from __future__ import annotations

import os
import random
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from pyrage import x25519

from workers import encryption, streams
from workers.encryption import decrypt, encrypt
from workers.errors import IntegrityError, Permanent, SettingsError, StoreUnavailable
from workers.secret import Secret
from workers.sections import EncryptionSettings
from workers.storage.local import LocalStore

OWN, OTHER, STRANGER = (x25519.Identity.generate() for _ in range(3))
RECIPIENTS = [str(OWN.to_public()), str(OTHER.to_public())]
BYTES = random.Random(5).randbytes(300_000)


def pieces(content: bytes, size: int = 7777) -> Iterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


@settings(max_examples=30)
@given(st.lists(st.binary(max_size=3000) | st.integers(0, 200_000).map(bytes), max_size=6))
def test_each_recipient_reads_what_was_written(chunks: list[bytes]) -> None:
    encrypted = b"".join(encrypt(iter(chunks), RECIPIENTS))

    for key in (OWN, OTHER):
        assert b"".join(decrypt(pieces(encrypted), [STRANGER, key], name="x")) == b"".join(chunks)


def test_the_age_program_reads_it_and_is_read(tmp_path: Path) -> None:
    key, file = tmp_path / "key.txt", tmp_path / "file.age"
    key.write_text(f"# made for a test\n{OWN}\n")
    file.write_bytes(b"".join(encrypt(pieces(BYTES), RECIPIENTS)))
    assert subprocess.check_output(["age", "--decrypt", "--identity", key, file]) == BYTES

    theirs = subprocess.check_output(["age", "--recipient", RECIPIENTS[0]], input=BYTES)
    assert b"".join(decrypt(pieces(theirs), encryption.identities(key.read_text()), name="x")) == BYTES


def test_other_keys_and_none_are_refused_with_what_to_set() -> None:
    encrypted = b"".join(encrypt([BYTES], RECIPIENTS))

    with pytest.raises(
        Permanent, match=r"^a\.zst\.age is encrypted for other keys than those of encryption\.identities$"
    ):
        list(decrypt([encrypted], [STRANGER], name="a.zst.age"))
    with pytest.raises(Permanent, match=r"no private key here; name one in encryption\.identities"):
        list(decrypt([encrypted], [], name="a.zst.age"))


@pytest.mark.parametrize("cut", [0, 1, 50, 210, 70_000, -70_000, -1])
def test_cut_short_it_is_refused(cut: int) -> None:
    encrypted = b"".join(encrypt([BYTES], RECIPIENTS))

    with pytest.raises(IntegrityError, match="x is damaged"):
        list(decrypt(pieces(encrypted[:cut]), [OWN], name="x"))


ENCRYPTED = b"".join(encrypt([BYTES[:100_000]], RECIPIENTS[:1]))


@settings(max_examples=40)
@given(st.integers(0, len(ENCRYPTED) - 1), st.integers(0, 7))
def test_one_flipped_bit_anywhere_is_refused(position: int, bit: int) -> None:
    damaged = bytearray(ENCRYPTED)
    damaged[position] ^= 1 << bit

    with pytest.raises((IntegrityError, Permanent)):
        list(decrypt(pieces(bytes(damaged)), [OWN], name="x"))


def test_an_error_of_the_source_comes_through_as_it_is_and_nothing_is_committed(tmp_path: Path) -> None:
    def fails() -> Iterator[bytes]:
        yield BYTES
        raise StoreUnavailable("the disk is gone")

    store = LocalStore(tmp_path)
    with pytest.raises(StoreUnavailable, match="the disk is gone"):
        streams.write(store, "parts/a.zst.age", fails(), level=1, recipients=RECIPIENTS)
    assert list(store.list("")) == []

    def fails_reading() -> Iterator[bytes]:
        yield b"".join(encrypt([BYTES], RECIPIENTS))[:150_000]
        raise StoreUnavailable("the disk is gone")

    with pytest.raises(StoreUnavailable, match="the disk is gone"):
        list(decrypt(fails_reading(), [OWN], name="x"))


def test_closed_early_its_thread_and_its_source_have_ended() -> None:
    closed = threading.Event()

    def endless() -> Iterator[bytes]:
        try:
            while True:
                yield BYTES
        finally:
            closed.set()

    before = threading.active_count()
    running = encrypt(endless(), RECIPIENTS)
    assert next(running)
    running.close()  # type: ignore[attr-defined]  # a generator, as its code says
    assert closed.is_set()
    assert threading.active_count() == before


def test_memory_stays_flat() -> None:
    def many() -> Iterator[bytes]:
        for _ in range(300):
            yield os.urandom(1 << 20)

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    list(decrypt(encrypt(iter([BYTES]), RECIPIENTS), [OWN], name="x"))
    before, size = resident(), 0
    for chunk in decrypt(encrypt(many(), RECIPIENTS), [OWN], name="x"):
        size += len(chunk)
    assert size == 300 << 20
    assert resident() - before < 100 << 20


def test_keys_that_are_none_are_refused_and_not_shown(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="a private key must not stand here") as error:
        EncryptionSettings(recipients=(str(OWN),))
    assert str(OWN) not in str(error.value.errors(include_input=False, include_context=False))

    file = tmp_path / "key.txt"
    file.write_text(f"{str(OWN)[:-3]}QQQ\n")
    with pytest.raises(
        SettingsError, match=r"encryption\.identities\.0: it holds a line that is no private key"
    ) as wrong:
        EncryptionSettings(identities=(Secret(file=file),)).private_keys()
    assert str(OWN)[:-3] not in str(wrong.value)


def test_where_a_file_of_keys_is_not_there_no_key_is(tmp_path: Path) -> None:
    there = tmp_path / "there"
    there.write_text(f"# old\n{OWN}\n\n{OTHER}\n")
    settings_ = EncryptionSettings(identities=(Secret(file=tmp_path / "absent"), Secret(file=there)))

    encrypted = b"".join(encrypt([BYTES], RECIPIENTS[1:]))
    assert len(settings_.private_keys()) == 2
    assert b"".join(decrypt([encrypted], settings_.private_keys(), name="x")) == BYTES
