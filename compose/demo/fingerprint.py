"""What the demo system holds, down to each row, key and file: taken before and after, the two must be equal.

Nothing here is shared with the code that backs up. From the command line, the fingerprint is printed as JSON:

    python -m compose.demo.fingerprint [--tree NAME=DIR]…

DEMO_ADMIN_DSN and DEMO_REDIS_URL, in the environment, name the servers; what is not named is left out.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

#: A key's expiry is read relative to two clocks, so it may differ by this much.
EXPIRY_TOLERANCE_MS = 3000


class Fingerprint(TypedDict):
    """One name and one description for each thing; a section that was not asked for is empty."""

    postgres: dict[str, str]
    redis: dict[str, list[Any]]
    files: dict[str, dict[str, str]]


def fingerprint(
    *, admin_dsn: str | None = None, redis_url: str | None = None, trees: Mapping[str, Path] | None = None
) -> Fingerprint:
    """Give the fingerprint of a server, a Redis and any number of named file trees.

    Raise psycopg.Error, redis.RedisError or OSError when one of them cannot be read.
    """
    result = Fingerprint(postgres={}, redis={}, files={})
    if admin_dsn:
        # Imported here: the files alone can be read where no database driver is installed.
        from compose.demo.fingerprint_postgres import fingerprint_postgres

        result["postgres"] = fingerprint_postgres(admin_dsn)
    if redis_url:
        from compose.demo.fingerprint_redis import fingerprint_redis

        result["redis"] = fingerprint_redis(redis_url)
    result["files"] = {name: fingerprint_tree(path) for name, path in (trees or {}).items()}
    return result


def fingerprint_tree(root: Path, *, folder_times: bool = True) -> dict[str, str]:
    """Give every entry below `root`, and `root` itself as ".": type, mode, owner, time in seconds, size, sha256 or target.

    Files that are hard links of each other name the first of their paths. The time of `root` is left out: moving things in and
    out of a mount point changes it. So are those of all folders without `folder_times`, for where only files are listed to be
    kept. A missing `root` gives nothing.
    """
    if not root.is_dir():
        return {}
    found: dict[str, str] = {}
    first: dict[tuple[int, int], str] = {}
    paths = sorted(root.rglob("*"), key=os.fsencode)
    for path in [root, *paths]:
        name = str(path.relative_to(root))
        info = path.lstat()
        text = f"{stat.filemode(info.st_mode)} {info.st_uid}:{info.st_gid}"
        if path != root and (folder_times or not stat.S_ISDIR(info.st_mode)):
            text += f" at {int(info.st_mtime)}"
        if stat.S_ISLNK(info.st_mode):
            text += f" -> {path.readlink()}"
        elif stat.S_ISREG(info.st_mode):
            with path.open("rb") as file:
                text += f" {info.st_size} bytes sha256 {hashlib.file_digest(file, 'sha256').hexdigest()}"
            if info.st_nlink > 1:
                text += f" same file as {first.setdefault((info.st_dev, info.st_ino), name)}"
        found[name] = text
    return found


def fingerprint_config(root: Path) -> dict[str, str]:
    """Give the entries below `root` that are no folders: of a configuration, files are backed up, not where they lie."""
    return {name: entry for name, entry in fingerprint_tree(root).items() if not entry.startswith("d")}


def diff(before: Fingerprint, after: Fingerprint) -> list[str]:
    """Give what differs, a line each, sorted; nothing when the two are equal.

    Moments of expiry may differ by `EXPIRY_TOLERANCE_MS`.
    """
    lines = _compare("postgres", before["postgres"], after["postgres"])
    old, new = before["redis"], after["redis"]
    lines += _compare(
        "redis", {k: (v[0], v[2]) for k, v in old.items()}, {k: (v[0], v[2]) for k, v in new.items()}
    )
    lines += [
        f"redis: {key}: expired {_expiry(old[key][1])}; now {_expiry(new[key][1])}"
        for key in sorted(old.keys() & new.keys())
        if not _same_moment(old[key][1], new[key][1])
    ]
    for tree in sorted(before["files"].keys() | after["files"].keys()):
        lines += _compare(f"files {tree}", before["files"].get(tree, {}), after["files"].get(tree, {}))
    return lines


def _compare(section: str, before: Mapping[str, object], after: Mapping[str, object]) -> list[str]:
    lines = []
    for name in sorted(before.keys() | after.keys()):
        shown = name.encode("utf-8", "backslashreplace").decode()
        if name not in after:
            lines.append(f"{section}: {shown}: missing; was {before[name]}")
        elif name not in before:
            lines.append(f"{section}: {shown}: new; is {after[name]}")
        elif before[name] != after[name]:
            lines.append(f"{section}: {shown}: was {before[name]}; is {after[name]}")
    return lines


def _same_moment(before: int | None, after: int | None) -> bool:
    if before is None or after is None:
        return before == after
    return abs(before - after) <= EXPIRY_TOLERANCE_MS


def _expiry(moment: int | None) -> str:
    return "never" if moment is None else f"at {moment} ms"


def main(arguments: list[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="compose.demo.fingerprint", description="What the demo system holds, as JSON."
    )
    parser.add_argument("--tree", action="append", default=[], metavar="NAME=DIR")
    given = parser.parse_args(arguments)
    trees = {name: Path(path) for name, _, path in (item.partition("=") for item in given.tree)}
    dsn, url = os.environ.get("DEMO_ADMIN_DSN"), os.environ.get("DEMO_REDIS_URL")
    # ASCII only: names that are no UTF-8 pass as escapes and come back the same.
    print(json.dumps(fingerprint(admin_dsn=dsn, redis_url=url, trees=trees)))


if __name__ == "__main__":
    main()
