"""The forms of file that the runbook's scripts write, told by name; what is in them is looked at by `tasks.foreign`."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import PurePosixPath

from tasks.components.postgres_base import BASE, MANIFEST
from workers.errors import IntegrityError

MOMENT = r"(?P<moment>\d{8}_\d{6})"
CONTAINER = re.compile(rf"(full|postgres)_backup_{MOMENT}\.tar\.gz")
"""A tar of such files."""
BESIDE = ("metadata.json", "backup.log")
"""What lies beside them in one."""
LEFT_UNPACKED = re.compile(r"(?P<folder>(.*/)?files/\d{8}/).*", re.DOTALL)
"""The folder that backup-files.sh packs, and leaves."""
EDGE = 4096


@dataclass(frozen=True)
class Form:
    """One form of file. A name that ends in ``.gz`` is of a compressed one."""

    name: re.Pattern[str]
    kind: str
    """The kind of component it is of."""
    part_kind: str
    begins: re.Pattern[bytes] | None = None
    """What is in its first 4,096 plain bytes; a tar is read as one instead."""
    ends: bytes = b""
    """What is in its last 4,096."""

    def read_edges(self, chunks: Iterable[bytes], name: str) -> None:
        """Read plain ``chunks`` to their end. Raises ``IntegrityError`` when they are not of this form."""
        head = tail = b""
        for chunk in chunks:
            head += chunk[: EDGE - len(head)]
            tail = (tail + chunk)[-EDGE:]
        if self.begins and not self.begins.search(head):
            raise IntegrityError(f"{name} does not begin as {self.part_kind} does")
        if self.ends not in tail:
            raise IntegrityError(f"{name} is cut short: it does not end with {self.ends.decode().strip()!r}")


def _name(pattern: str) -> re.Pattern[str]:
    """Compile the pattern of a name that the scripts follow by the moment, and people who rename files do not."""
    return re.compile(pattern.replace("MOMENT", rf"(_{MOMENT})?"))


FORMS = (
    Form(
        _name(r"all_databasesMOMENT\.sql(\.gz)?"),
        "postgres",
        "postgres-plain",
        re.compile(rb"\A--\n-- PostgreSQL database cluster dump\n"),
        b"-- PostgreSQL database cluster dump complete\n",
    ),
    Form(
        _name(r"(?P<database>.+?)MOMENT\.sql(\.gz)?"),
        "postgres",
        "postgres-plain",
        re.compile(rb"\A--\n-- PostgreSQL database dump\n"),
        b"-- PostgreSQL database dump complete\n",
    ),
    Form(_name(r"(?P<database>.+?)MOMENT\.dump"), "postgres", "postgres-dump", re.compile(rb"\APGDMP")),
    Form(_name(r"(.+_)?base(_?backup)?MOMENT\.tar(\.gz)?"), "postgres", BASE),
    Form(_name(r"redisMOMENT\.rdb(\.gz)?"), "redis", "redis-rdb", re.compile(rb"\AREDIS[0-9]{4}")),
    Form(
        _name(r"appendonlyMOMENT\.aof(\.gz)?"),
        "redis",
        "redis-aof",
        re.compile(rb"\A(\*[0-9]+\r\n|REDIS[0-9]{4})"),
    ),
    Form(_name(r"files_backupMOMENT\.tar\.gz"), "files", "files-tar"),
    Form(_name(r"configMOMENT\.tar\.gz"), "config", "files-tar"),
)


def form_of(name: str) -> Form | None:
    """Return the form that a file's name says."""
    return next((form for form in FORMS if form.name.fullmatch(name)), None)


def looks_foreign(key: str) -> bool:
    """Say whether a key has a name that the runbook's scripts give; full archives of ours have one of them, too."""
    name = PurePosixPath(key).name
    return bool(CONTAINER.fullmatch(name)) or form_of(name) is not None


def moment_of(name: str, otherwise: datetime) -> datetime:
    """Return the time in a name, which is in no zone and taken as UTC; ``otherwise`` for a name without one."""
    match = re.search(MOMENT, name)
    return datetime.strptime(f"{match['moment']}+0000", "%Y%m%d_%H%M%S%z") if match else otherwise


def belongs_to_another(key: str, keys: Collection[str]) -> bool:
    """Say whether a key is that of a file which is read with another one: the manifest beside a base backup."""
    path = PurePosixPath(key)
    if path.name != MANIFEST:
        return False
    beside = (other for other in keys if PurePosixPath(other).parent == path.parent)
    return any((form := form_of(PurePosixPath(other).name)) and form.part_kind == BASE for other in beside)


def why_not(key: str) -> tuple[str, str]:
    """Return what the file under a key is not imported as, and the key or folder of which that is to be said."""
    name = PurePosixPath(key).name
    if match := LEFT_UNPACKED.fullmatch(key):
        return match["folder"], "a copy of folders, of which files_backup_*.tar.gz is made: import that"
    if name in BESIDE:
        return (
            key,
            "it describes the files of a full backup that lie beside it, which are imported one by one",
        )
    return key, f"{name} is no name that the runbook's scripts give"
