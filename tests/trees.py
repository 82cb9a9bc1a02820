"""Made trees, an independent look at them, and a component's backup kept in memory.

Names in any bytes are not for `pathlib`.
"""

# ruff: noqa: PTH101, PTH103, PTH115, PTH118, PTH123, PTH208, PTH211

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from workers.component import BaseComponent, Part, Restore

FILE_NAMES = (
    st.binary(min_size=1, max_size=40)
    .map(lambda name: name.replace(b"/", b"-").replace(b"\0", b"\n"))
    .filter(lambda name: name not in (b".", b"..") and not name.startswith(b".ai-micro-backup-"))
)
AWKWARD = st.sampled_from(
    [
        b"-rf",
        b"a b",
        b"new\nline",
        b".hidden",
        b"..x",
        b"\xff\xfe",
        b"*",
        "写真 'é\".jpg".encode(),
        b"x" * 255,
        b"\\n",
    ]
)
NAMES = FILE_NAMES | AWKWARD
TIMES = st.integers(0, 4_000_000_000_999_999_999)
OWNERS = st.sampled_from([0, 1000, 65534, 3_000_000_000]) if os.geteuid() == 0 else st.just(os.geteuid())
FILE_MODES = st.sampled_from([0o600, 0o644, 0o755, 0o4755, 0o400] + ([0o000] if os.geteuid() == 0 else []))
FOLDER_MODES = st.sampled_from([0o700, 0o755, 0o2755, 0o1777] + ([0o555] if os.geteuid() == 0 else []))
ACL = bytes.fromhex(
    "02000000 01000600ffffffff 02000600d2040000 04000400ffffffff 10000600ffffffff 20000000ffffffff"
)
"""user::rw- user:1234:rw- group::r-- mask::rw- other::---, as the kernel keeps it."""
FILES = st.tuples(st.just("file"), st.binary(max_size=3000), FILE_MODES, TIMES, OWNERS)
NODES: st.SearchStrategy[tuple[Any, ...]] = st.recursive(
    FILES
    | st.tuples(st.just("sparse"), st.integers(0, 4_000_000), FILE_MODES, TIMES, OWNERS)
    | st.tuples(
        st.just("marked"),
        FILES,
        st.dictionaries(st.text("abc.", min_size=1, max_size=9), st.binary(max_size=99), max_size=2),
        st.booleans(),
    )
    | st.tuples(st.just("link"), NAMES | st.just(b"../../elsewhere") | st.just(b"/nowhere/at/all"))
    | st.tuples(st.just("hard"), st.integers(0, 10))
    | st.tuples(st.just("special"), st.sampled_from([stat.S_IFSOCK, stat.S_IFIFO])),
    lambda children: st.tuples(
        st.just("folder"), st.dictionaries(NAMES, children, max_size=5), FOLDER_MODES, TIMES, OWNERS
    ),
    max_leaves=12,
)
TREES = st.tuples(st.just("folder"), st.dictionaries(NAMES, NODES, max_size=6), FOLDER_MODES, TIMES, OWNERS)


def make(  # noqa: C901, PLR0912  one case a kind
    path: bytes, node: tuple[Any, ...], files: list[bytes] | None = None
) -> None:
    """Make a node of `TREES` at ``path``; a hard link is one to any file made before it, or none."""
    files = [] if files is None else files
    match node:
        case ("link", target):
            os.symlink(target, path)
            return
        case ("hard", number):
            if files:
                os.link(files[number % len(files)], path)
            return
        case ("special", kind):
            os.mknod(path, kind | 0o600)
            return
        case ("marked", file, attributes, acl):
            make(path, file, files)
            if not os.access(path, os.W_OK):
                return
            for name, value in attributes.items():
                os.setxattr(path, f"user.{name}", value)
            if acl:
                os.setxattr(path, "system.posix_acl_access", ACL)
            return
        case ("sparse", size, mode, mtime, owner):
            with open(path, "wb") as sparse:
                sparse.truncate(size)
                sparse.seek(size // 2)
                sparse.write(b"in the middle")
            files.append(path)
        case ("folder", children, mode, mtime, owner):
            os.makedirs(path, exist_ok=True)
            for name, child in children.items():
                make(os.path.join(path, name), child, files)
        case (_, content, mode, mtime, owner):
            with open(path, "wb") as file:
                file.write(content)
            files.append(path)
        case _:
            raise AssertionError(node)
    if os.geteuid() == 0:
        os.chown(path, owner, owner)
    os.chmod(path, mode)
    os.utime(path, ns=(mtime, mtime))


def look(path: Path | str, *, owners: bool = True, attributes: bool = False) -> dict[bytes, tuple[Any, ...]]:
    """Return all there is to compare of the tree at ``path``, itself as ``.``, without our own folders.

    Sockets and FIFOs are no part of it; extended attributes and ACLs are with ``attributes``.
    """
    root = os.fsencode(path)
    found, inodes = {}, dict[int, bytes]()
    names = [b"."]
    for folder, folders, files in os.walk(root):
        below = [os.path.relpath(os.path.join(folder, name), root) for name in sorted(folders + files)]
        names += [name for name in below if b".ai-micro-backup-" not in name]
    for name in sorted(names):
        place = os.path.join(root, name)
        status = os.lstat(place)
        kind = stat.S_IFMT(status.st_mode)
        if kind in (stat.S_IFSOCK, stat.S_IFIFO):
            continue
        first = inodes.setdefault(status.st_ino, name) if kind == stat.S_IFREG else name
        content = ""
        if kind == stat.S_IFREG:
            with open(place, "rb") as file:
                content = hashlib.file_digest(file, "sha256").hexdigest()
        elif kind == stat.S_IFLNK:
            content = repr(os.readlink(place))
        owner = (status.st_uid, status.st_gid) if owners else ()
        size = status.st_size if kind != stat.S_IFDIR else 0
        found[name] = (
            kind,
            stat.S_IMODE(status.st_mode),
            owner,
            status.st_mtime_ns // 10**9,
            size,
            content,
            first,
            *(attributes_of(place) if attributes else ()),
        )
    return found


def attributes_of(path: bytes) -> list[tuple[str, bytes]]:
    """Return the extended attributes of a file or folder, ACLs among them, but for labels of the host's policy."""
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return [
        (name, os.getxattr(path, name, follow_symlinks=False)) for name in names if name != "security.selinux"
    ]


def backed_up(component: BaseComponent) -> tuple[Part, bytes]:
    """Back up the one stream of ``component`` into memory."""
    (source,) = component.sources()
    plain = b"".join(source.chunks)
    now, digest = datetime.now(UTC), hashlib.sha256(plain).hexdigest()
    size = len(plain)
    part = Part(
        name=source.name, component=component.name, host=component.host, kind=source.kind, codec="none", size=size, sha256=digest,
        plain_size=size, plain_sha256=digest, started=now, finished=now, holds=source.holds,
    )  # fmt: skip
    return part, plain


def restoring(
    part: Part, plain: bytes, *, run_id: str = "run1", chunk: int = 10_000, **options: Any
) -> Restore:
    """Return the restore of a part kept in memory."""

    def read(_part: Part) -> Iterator[bytes]:
        for start in range(0, len(plain), chunk):
            yield plain[start : start + chunk]

    reader: Callable[[Part], Iterator[bytes]] = read
    return Restore(run_id, [part], reader, options)


def leftovers(folder: Path) -> list[str]:
    """Return what of ours is in ``folder``."""
    return [name for name in sorted(os.listdir(folder)) if name.startswith(".ai-micro-backup-")]
