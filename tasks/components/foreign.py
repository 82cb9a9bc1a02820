"""Archives of the runbook's scripts: tar files that nobody described when they were made."""

from __future__ import annotations

import re
import tarfile
from collections.abc import Iterable, Mapping
from typing import Any

from workers.errors import Permanent
from workers.tar import TreeDigest
from workers.tar_format import Member

DAY = re.compile(rb"[0-9]{8}")
PATHS = 10_000
"""How many paths of files are noted; a set of configuration files has fewer."""


def describe_foreign(chunks: Iterable[bytes]) -> dict[str, Any]:
    """Return what a record of ours would say of the plain tar stream ``chunks``, reading it to its end.

    ``trees`` are the folders and files in the one folder that the runbook names by the day (``20251001/uploads``), or
    else those at the top, each ``folder`` or ``file``. ``paths`` are the names of what is no folder, of sets of at most
    10,000. Raises ``IntegrityError`` for what is no tar archive, or an unsafe one.
    """
    tops, seconds, paths = dict[bytes, str](), dict[bytes, str](), list[str]()

    def see(member: Member) -> None:
        parts = member.name.split(b"/")
        folder = member.type == tarfile.DIRTYPE
        for depth, known in ((1, tops), (2, seconds)):
            if len(parts) >= depth:
                known[b"/".join(parts[:depth])] = "folder" if folder or len(parts) > depth else "file"
        if not folder and len(paths) <= PATHS:
            paths.append(member.name.decode(errors="surrogateescape"))

    digest = TreeDigest(see=see)
    for _ in digest.through(chunks):
        pass
    tops.pop(b".", None)
    of_a_day = len(tops) == 1 and DAY.fullmatch(next(iter(tops)))
    trees = seconds if of_a_day else tops
    return {
        "files": digest.files,
        "bytes": digest.bytes,
        "entries": digest.entries,
        "outward_links": digest.outward_links,
        "tree_sha256": digest.sha256,
        "digest_version": digest.version,
        "warnings": [],
        "trees": {name.decode(errors="backslashreplace"): kind for name, kind in trees.items()},
        "paths": paths if len(paths) <= PATHS and not of_a_day else [],
    }


def tree_for(name: str, holds: Mapping[str, Any]) -> str:
    """Return which of the ``trees`` belongs to a folder called ``name``.

    ``/app/keys`` is ``keys``, or, as the runbook calls it, ``auth-keys``. Raises ``Permanent`` when none is, or several.
    """
    folders = [tree for tree, kind in holds["trees"].items() if kind == "folder"]
    named = [tree for tree in folders if tree.rpartition("/")[2] == name]
    found = named or [tree for tree in folders if tree.endswith(f"-{name}")]
    if len(found) != 1:
        there = ", ".join(folders) or "none"
        raise Permanent(
            f"the backup must hold one folder for {name!r}; of its folders ({there}), {len(found)} fit"
        )
    return str(found[0])
