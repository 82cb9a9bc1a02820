"""The demo's files: uploads of every awkward kind, the text read from them, and the RSA keys."""

from __future__ import annotations

import hashlib
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from compose.demo.material import Material

#: Names that break scripts. All are documents; `None` as the size means "as large as the others".
AWKWARD: tuple[tuple[str, int | None], ...] = (
    ("見積書 2025年 (最終版).pdf", None),
    ('it\'s a "quoted" name.pdf', None),
    (" leading and trailing ", 100),
    ("-rf", 10),
    ("new\nline.txt", 30),
    ("$(touch oops) `id` ; & | * ? [a] \\ %s.txt", 50),
    ("empty.txt", 0),
    ("deep/" + "/".join(["a rather long folder name"] * 8) + "/" + "long" * 50 + ".txt", 2000),
)


@dataclass(frozen=True)
class Document:
    """A file below the uploads folder, as its row in admindb names it."""

    path: str
    size: int
    sha256: str


def seed_uploads(folder: Path, *, megabytes: float, material: Material, owner: int | None) -> list[Document]:
    """Fill `folder`, emptied first, with about `megabytes` of documents and what lies beside them.

    Beside the documents: the text read from each (`ocr/`), a name that is not UTF-8, symbolic links (one to nowhere), hard
    links, an empty folder, unusual modes. With `owner` everything belongs to that uid, one folder to the next one.
    """
    empty(folder)
    count = max(len(AWKWARD) + 4, round(megabytes * 5))
    average = int(megabytes * 1_000_000 / count)
    names = [
        *AWKWARD,
        *((f"2025/{i % 12 + 1:02}/scan-{i:05}.pdf", None) for i in range(count - len(AWKWARD))),
    ]
    documents: list[Document] = []
    for name, fixed in names:
        size = int(average * material.random.uniform(0.2, 1.8)) if fixed is None else fixed
        data = material.data(size)
        _write(folder / name, data)
        _write(folder / "ocr" / f"{len(documents):05}.txt", material.text(300).encode())
        documents.append(Document(path=name, size=size, sha256=hashlib.sha256(data).hexdigest()))
    _oddities(folder, material)
    _settle(folder, material, owner)
    if owner is not None:
        os.chown(folder / "private", owner + 1, owner + 1)
    return documents


def _oddities(folder: Path, material: Material) -> None:
    _write(Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.txt")), b"a name in Latin-1\n")
    (folder / "nothing yet").mkdir()
    private = folder / "private"
    private.mkdir()
    _write(private / "read-only.txt", material.data(500))
    _write(private / "run.sh", b"#!/bin/sh\nexit 0\n")
    (private / "read-only.txt").chmod(0o400)
    (private / "run.sh").chmod(0o755)
    private.chmod(0o2750)
    (folder / "latest.pdf").symlink_to("2025/01/scan-00000.pdf")
    (folder / "この年").symlink_to("2025")
    (folder / "gone.pdf").symlink_to("../no/such/file.pdf")
    (folder / "links").mkdir()
    for name in ("first", "second"):
        os.link(folder / "2025/01/scan-00000.pdf", folder / "links" / f"{name}.pdf")


def seed_keys(folder: Path, *, owner: int | None) -> rsa.RSAPrivateKey:
    """Fill `folder`, emptied first, with a new RSA key pair, and give the private key."""
    empty(folder)
    key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for name, data, mode in (("private.pem", private, 0o600), ("public.pem", public, 0o644)):
        with os.fdopen(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(data)
        (folder / name).chmod(mode)
    folder.chmod(0o700)
    if owner is not None:
        for path in (folder, folder / "private.pem", folder / "public.pem"):
            os.chown(path, owner, owner)
    return key


def empty(folder: Path) -> None:
    """Remove everything in `folder`, which is made when missing and stays itself: it may be a mount point."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def _settle(folder: Path, material: Material, owner: int | None) -> None:
    """Give everything an old time and its owner, the deepest first: writing into a folder changes the folder's time."""
    paths = sorted(folder.rglob("*"), key=lambda path: (-len(path.parts), os.fsencode(path)))
    for path in [*paths, folder]:
        if owner is not None:
            # chown clears setgid on a file; the one setgid entry here is a folder, where it stays.
            os.chown(path, owner, owner, follow_symlinks=False)
        moment = int(material.moment().timestamp())
        os.utime(path, (moment, moment), follow_symlinks=False)
