"""The inspector against archives of Python's `tarfile`, of GNU tar, and of an attacker."""

import hashlib
import io
import random
import subprocess
import tarfile
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workers.errors import IntegrityError
from workers.tar import TreeDigest

LONG = "folder/" + "é" * 120 + "/" + "n" * 150


Given = tarfile.TarInfo | tuple[tarfile.TarInfo, bytes]


def archive(*members: Given, written_as: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=written_as) as tar:
        for member in members:
            info, content = member if isinstance(member, tuple) else (member, b"")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def entry(path: str, kind: bytes = tarfile.REGTYPE, **fields: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.type, info.mtime = kind, 1_700_000_000
    for field, value in fields.items():
        setattr(info, field, value)
    return info


def inspect(data: bytes, *, chunk: int = 4096, **options: Any) -> TreeDigest:
    digest = TreeDigest(**options)
    chunks = [data[start : start + chunk] for start in range(0, len(data), chunk)]
    assert b"".join(digest.through(chunks)) == data
    return digest


@settings(deadline=None)
@given(st.integers(1, 3000), st.binary(max_size=2000))
def test_it_counts_what_is_there_however_the_stream_is_cut(chunk: int, content: bytes) -> None:
    data = archive(
        entry("d", tarfile.DIRTYPE), (entry("d/f"), content), (entry(LONG), b"long"), entry("zero")
    )
    digest = inspect(data, chunk=chunk, listing=True)
    assert (digest.entries, digest.files, digest.bytes) == (4, 3, len(content) + 4)
    assert digest.largest == max(len(content), 4)
    assert digest.contents["d/f"] == hashlib.sha256(content).hexdigest()
    assert digest.contents[LONG] == hashlib.sha256(b"long").hexdigest()


@pytest.mark.parametrize("written_as", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_the_digest_depends_on_neither_order_nor_format(written_as: int) -> None:
    members: list[Given] = [
        (entry("d/f", mode=0o4750, uid=1000), b"x"), entry("d", tarfile.DIRTYPE),
        entry("d/" + "n" * 99 + "/" + "m" * 50), entry("s", tarfile.SYMTYPE, linkname="d/f"),
    ]  # fmt: skip
    expected = inspect(archive(*members)).sha256
    shuffled = random.Random(written_as).sample(members, len(members))
    assert inspect(archive(*shuffled, written_as=written_as)).sha256 == expected


@pytest.mark.parametrize(
    ("field", "value", "owner"),
    [
        ("name", "g", False), ("mode", 0o600, False), ("uid", 7, True), ("gid", 7, True), ("mtime", 5, False),
        ("type", tarfile.FIFOTYPE, False),
    ],
)  # fmt: skip
def test_every_property_counts(field: str, value: Any, owner: bool) -> None:
    plain = inspect(archive(entry("f")))
    other = inspect(archive(entry("f", **{field: value})))
    assert plain.sha256 != other.sha256
    assert (plain.sha256_of(owners=False) == other.sha256_of(owners=False)) is owner


def test_contents_links_and_second_entries_count() -> None:
    archives = [
        archive((entry("f"), b"a")), archive((entry("f"), b"b")),
        archive((entry("f"), b"a"), (entry("f"), b"a")),
        *(archive(entry("s", kind, linkname=to)) for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE) for to in "fg"),
    ]  # fmt: skip
    assert len({inspect(data).sha256 for data in archives}) == len(archives)


@pytest.mark.parametrize(
    ("mtime", "whole"),
    [("1700000000.999999999", 1_700_000_000), ("-1.5", -2), ("-1.0", -1), ("7", 7), ("0.1", 0)],
)
def test_fractions_of_a_second_are_dropped_downwards(mtime: str, whole: int) -> None:
    fraction = entry("f", pax_headers={"mtime": mtime})
    assert inspect(archive(fraction)).sha256 == inspect(archive(entry("f", mtime=whole))).sha256


def test_gnu_tars_archives_with_any_bytes_in_names_holes_and_links(tmp_path: Path) -> None:
    root = tmp_path / "root"
    (root / "d").mkdir(parents=True)
    with (root / "sparse").open("wb") as file:
        file.seek(3_000_000)
        file.write(b"middle")
        file.seek(5_000_000)
        file.write(b"x" * 5000)
        file.truncate(9_000_000)
    (root / "d" / "f").write_bytes(b"content")
    (root / "d" / "hard").hardlink_to(root / "d" / "f")
    (root / "d" / "soft").symlink_to("/else/where")
    (root / "d" / ("ü" * 100)).write_bytes(b"long")
    found = {}
    for options in (["--sparse", "--format=posix"], ["--format=posix"], ["--format=gnu"]):
        data = subprocess.run(
            ["tar", "-c", "--sort=name", *options, "-C", str(tmp_path), "root"],
            check=True,
            capture_output=True,
        ).stdout
        digest = inspect(data, chunk=1 << 16, listing=True)
        old = inspect(data, chunk=5000, listing=True, version=1)
        assert old.contents["root/sparse"] == hashlib.sha256((root / "sparse").read_bytes()).hexdigest()
        assert digest.contents["root/d/hard"] == "-> root/d/f"
        assert (digest.bytes, digest.outward_links) == (9_000_011, 1)
        found[len(data)] = digest.sha256
    assert len(found) == 3
    assert len(set(found.values())) == 1
    assert min(found) < 100_000


def test_old_sparse_formats_are_refused_by_name(tmp_path: Path) -> None:
    with (tmp_path / "holes").open("wb") as file:
        file.truncate(9_000_000)
    for options in (["--format=gnu"], ["--format=posix", "--sparse-version=0.1"]):
        tar = ["tar", "-cS", *options, "-C", str(tmp_path), "holes"]
        with pytest.raises(IntegrityError, match="holes"):
            inspect(subprocess.run(tar, check=True, capture_output=True).stdout)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([entry("/etc/passwd")], "/etc/passwd"),
        ([entry("a/../../b")], "a/../../b"),
        ([entry("..", tarfile.DIRTYPE)], "out of the tree"),
        ([entry("x", pax_headers={"path": "/etc/shadow"})], "/etc/shadow"),
        ([entry("null", tarfile.CHRTYPE)], "null: a device node"),
        ([entry("disk", tarfile.BLKTYPE)], "disk: a device node"),
        ([entry("volume", b"V")], "volume: an entry of the unknown type"),
        ([entry("h", tarfile.LNKTYPE, linkname="/etc/passwd")], "h: a hard link out"),
        ([entry("h", tarfile.LNKTYPE, linkname="a/../../b")], "h: a hard link out"),
        (
            [entry("s", tarfile.SYMTYPE, linkname="/etc"), entry("s/passwd")],
            "s/passwd: .*through a symbolic link",
        ),
        (
            [entry("d/s", tarfile.SYMTYPE, linkname="."), entry("./d/.//s/./x")],
            "d/s/x: .*through a symbolic link",
        ),
        (
            [entry("d/./s", tarfile.SYMTYPE, linkname="."), entry("d/s/x/y")],
            "d/s/x/y: .*through a symbolic link",
        ),
        (
            [
                entry("s", tarfile.SYMTYPE, linkname="/"),
                entry("h", tarfile.LNKTYPE, linkname="s"),
                entry("h/x"),
            ],
            "h/x: .*through a symbolic link",
        ),
        (
            [entry("s", tarfile.SYMTYPE, linkname="/"), entry("h", tarfile.LNKTYPE, linkname="s/etc")],
            "h: a hard link through",
        ),
    ],
)
def test_what_would_be_written_outside_is_refused_by_name(
    members: list[tarfile.TarInfo], message: str
) -> None:
    with pytest.raises(IntegrityError, match=message):
        inspect(archive(*members))


@pytest.mark.parametrize("written_as", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_nothing_of_a_chunk_with_a_refused_member_is_passed_on(written_as: int) -> None:
    data = archive(entry("good"), entry("n" * 200 + "/../../../evil"), written_as=written_as)
    passed = bytearray()

    def pass_on() -> None:
        for chunk in TreeDigest().through([data[start : start + 512] for start in range(0, len(data), 512)]):
            passed.extend(chunk)

    with pytest.raises(IntegrityError, match="evil"):
        pass_on()
    header = data.index(b"n" * 60, data.rindex(b"evil"))
    assert len(passed) == header // 512 * 512


@pytest.mark.parametrize("target", ["/etc", "../x", "d/../../x", ".."])
def test_links_out_of_the_tree_are_counted_and_limited(target: str) -> None:
    data = archive(entry("s", tarfile.SYMTYPE, linkname=target))
    assert inspect(data).outward_links == 1
    inspect(data, outward_links=1)
    with pytest.raises(IntegrityError, match="s: a symbolic link out of the tree"):
        inspect(data, outward_links=0)
    inside = archive(
        entry("d/s", tarfile.SYMTYPE, linkname="../d/./x"), entry("d/t", tarfile.SYMTYPE, linkname="...")
    )
    assert inspect(inside, outward_links=0).outward_links == 0


def test_a_stream_that_is_cut_anywhere_is_refused() -> None:
    data = archive((entry("f"), b"x" * 700), (entry(LONG), b"y"), entry("z"))
    end = len(data.rstrip(b"\0")) // 512 * 512 + 512
    for length in [*range(0, end + 1024, 64), end + 1023]:
        with pytest.raises(IntegrityError, match="cut short"):
            inspect(data[:length])
    inspect(data[: end + 1024])


@pytest.mark.parametrize("data", [b"not a tar" * 200, bytes(512) + b"x" * 512, b"\x1f\x8b" * 512])
def test_what_is_no_tar_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"not a tar|follows its end"):
        inspect(data)


def test_something_behind_the_end_is_refused() -> None:
    with pytest.raises(IntegrityError, match="follows its end"):
        inspect(archive(entry("f")) + b"x")


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.realsize": "10"},
        {"GNU.sparse.major": "1", "GNU.sparse.realsize": "-1"},
        {"GNU.sparse.major": "1", "GNU.sparse.realsize": "x"},
        {"mtime": "soon"},
        {"uid": "x"},
    ],
)
def test_nonsense_in_a_header_is_refused(headers: dict[str, str]) -> None:
    for body in (b"1\n0\n1000000\n", b"1\n5000\n1\n", b"999999999\n", b"-1\n", b"x" * 600):
        with pytest.raises(IntegrityError):
            inspect(archive((entry("f", pax_headers=headers), body.ljust(1024, b"\0"))))


def test_a_huge_extended_header_is_refused_before_it_is_read() -> None:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    with pytest.raises(IntegrityError, match="extended header of 8589934592 bytes"):
        inspect(header.tobuf(tarfile.GNU_FORMAT) + bytes(512))


def test_bodies_pass_in_flat_memory() -> None:
    chunk = bytes(1 << 18)

    def chunks() -> Iterator[bytes]:
        yield entry("big", size=800 * len(chunk)).tobuf()
        for _ in range(800):
            yield chunk
        yield bytes(1024)

    digest = TreeDigest()
    tracemalloc.start()
    for _ in digest.through(chunks()):
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert digest.bytes == 800 * len(chunk)
    assert peak < 1_000_000
