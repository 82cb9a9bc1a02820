"""Redis: a checked RDB snapshot or the append-only file, and its restore in the layout that the server will read.

Everything happens where the server lives, with ``redis-cli`` and the tools of any Linux. Facts about the server are
from the sources of Redis 6.2 and 7.0 (``rdb.c``, ``aof.c``, ``redis-check-rdb.c``) and were tried on both.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import PurePosixPath
from typing import Any, ClassVar, Literal

from tasks.components.redis_aof import CHECK_AOF, length, read_aof, usable
from tasks.components.redis_by_hand import instructions
from tasks.components.redis_preflight import preflight_server
from tasks.components.redis_rdb import CHECK_FILE, Passing, checked, read_through
from tasks.components.redis_scratch import load
from tasks.components.redis_server import AOF, RDB, USUAL_FOLDERS, Layout, RedisServer, databases, server_time
from tasks.components.redis_snapshot import read_file, read_network
from tasks.components.redis_swap import (
    ARRANGE,
    BEGIN,
    DROP,
    PREPARE,
    RECEIVE,
    REVERT,
    SWAP,
    WRITE,
    Staged,
)
from tasks.components.redis_users import REVERT as REVERT_USERS
from tasks.components.redis_users import SWAP as SWAP_USERS
from tasks.components.redis_users import (
    USERS,
    check_users,
    compare_users,
    plan_users,
    read_users,
    stage_users,
)
from workers.component import NO_OPTIONS, Finding, Part, Restore, Source, part_name
from workers.errors import (
    BackupError,
    CommandFailed,
    ComparisonError,
    IntegrityError,
    Permanent,
    RuntimeUnavailable,
)

SIZE = 'wc -c <"$1"'


class Component(RedisServer):
    """A Redis server. ``data_dir`` and the names below it are asked from the server where they are not set."""

    metadata_key: ClassVar[str] = "redis"
    days_kept: ClassVar[float | None] = 7

    kind: Literal["redis"]

    def sources(self, options: Mapping[str, Any] = NO_OPTIONS) -> list[Source]:
        """Open a snapshot or the append-only file, by the ``method`` of the settings, and the users of an aclfile.

        ``holds`` has the exact numbers of ``keys`` and of those that expire (``expires``), and both for each database
        (``databases``, ``expiring``). They are missing when a snapshot came over the network and there is no server
        program to check it with.
        """
        info = self.source_info()
        found = [self._data(info)]
        if self.users and self.has_aclfile():
            holds: dict[str, Any] = {}
            found.append(
                Source(f"{self.name} users", f"{self.name}.acl", USERS, read_users(self, holds), holds=holds)
            )
        return found

    def _data(self, info: dict[str, str]) -> Source:
        holds: dict[str, Any] = {"server_version": info.get("valkey_version") or info["redis_version"]}
        if modules := self.modules():
            holds["modules"] = modules
        if self.method == "network":
            return Source(self.name, f"{self.name}.rdb", RDB, read_network(self, holds), holds=holds)
        layout = self.layout(info)
        if self.method == "aof":
            size = length(usable(self))
            chunks = read_aof(self, layout, holds)
            return Source(self.name, f"{self.name}.aof", AOF, chunks, expected=size, holds=holds)
        began = server_time(self.snapshot())
        chunks, size = read_file(self, layout.dump, holds, began=began), int(self.sh(SIZE, layout.dump))
        return Source(self.name, f"{self.name}.rdb", RDB, chunks, expected=size, holds=holds)

    def overwrites(self, parts: Sequence[Part], options: Mapping[str, Any] = NO_OPTIONS) -> list[str]:
        try:
            held = databases(self.info())
        except RuntimeUnavailable:
            self.sh("true")  # raises when it is the container that is not there: a restore creates it first
            now = "whatever the server holds, which does not answer,"
        else:
            now = f"{sum(held.values())} keys" + (f" ({described(held)})" if held else "")
        part = self._part(parts)
        age = datetime.now(UTC) - part.started
        recorded = part.holds.get("keys", "an unrecorded number of")
        old = f"{age.days} d {age.seconds // 3600} h {age.seconds // 60 % 60} min old"
        taken = f"{part.started:%Y-%m-%d %H:%M} UTC, {old}"
        lines = [f"Redis {self.name}: {now} will be replaced by {recorded} keys of {taken}"]
        users = self._users(parts)
        return [*lines, plan_users(self, users)] if users else lines

    def by_hand(self, parts: Sequence[Part]) -> str:
        users = next((part for part in parts if part.kind == USERS), None)
        return instructions(self, self._part(parts), users)

    def stage(self, restore: Restore) -> None:
        part = self._part(restore.parts)
        if self.container is None and not (self.start and self.stop and self.status):
            raise Permanent(f"{self.name}: a restore needs the commands start, stop and status")
        layout, running = self.layout_to_restore()
        staging = self._staging(layout.folder, restore)
        if "old" in self._state(staging):
            return  # its swap has begun, so it was staged
        if running and (missing := sorted(set(part.holds.get("modules", ())) - set(self.modules()))):
            raise Permanent(
                f"{self.name}: the backup is of a server with the modules {', '.join(missing)}, which this one has not "
                "loaded; load them (loadmodule), or their data cannot be read"
            )
        self.sh(PREPARE, staging)
        users = self._users(restore.parts)
        aclfile = stage_users(self, users, restore, layout, staging, running=running) if users else None
        file = staging / "new" / layout.dbfilename
        try:
            counts, form = self._receive(part, restore, layout, file)
        except CommandFailed as error:
            raise ComparisonError(
                f"{self.name}: its server (Redis {layout.version}) cannot read the backup, "
                f"which Redis {part.holds.get('server_version', 'of an unknown version')} wrote: {error.stderr}"
            ) from error
        self._compare(part, counts, "staged")
        self.sh(ARRANGE, staging / "new", f"{form}-{layout.form}", *layout.names)
        staged = Staged(
            layout.names,
            bool(layout.appendonly),
            running,
            form == "dump",
            counts["keys"],
            counts["expires"],
            counts.get("databases", {}),
            counts.get("expiring", {}),
            str(aclfile or ""),
        )
        self.sh(WRITE, staging / "staged.json", chunks=[json.dumps(asdict(staged)).encode()])

    def _receive(
        self, part: Part, restore: Restore, layout: Layout, file: PurePosixPath
    ) -> tuple[Mapping[str, Any], Literal["dump", "aof"]]:
        """Put the part at ``file``, checked, and return how many keys it has and what it is there.

        A server with ``appendonly no`` reads no append-only file: a scratch server makes a dump of it.
        """
        if part.kind == RDB:
            passing = Passing()
            self.sh(RECEIVE, file, chunks=passing.through(restore.read(part)))
            return passing.report(self.sh(CHECK_FILE, self.server, file), part.name).holds, "dump"
        if layout.form == "none":
            return load(self, restore.read(part), form="aof", dump=file).holds, "dump"
        self.sh(RECEIVE, file, chunks=restore.read(part))
        self.sh(CHECK_AOF, self.server, file)
        counted = part.holds if "keys" in part.holds else load(self, restore.read(part), form="aof").holds
        return counted, "aof"

    def swap(self, restore: Restore) -> None:
        staging = self._find(restore)
        state = self._state(staging) if staging else set()
        if staging is None or "staged.json" not in state:
            raise Permanent(f"{self.name}: nothing is staged for {restore.run_id}")
        staged = self._staged(staging)
        if "swapped" not in state:
            if not staged.appendonly and self.service.is_running():
                self.snapshot()  # a server without save points would take what it holds with it
            self.sh(BEGIN, staging)
            self.service.stop()
            if staged.aclfile:
                self.sh(SWAP_USERS, staging, staged.aclfile)
            self.sh(SWAP, staging, *staged.names)
        try:
            self.start_service()
            info = self.loaded()
        except (ComparisonError, CommandFailed, RuntimeUnavailable) as error:
            if reason := self._reason(restore):
                raise ComparisonError(
                    f"{self.name}: the server did not come up: {error}; {reason}"
                ) from error
            raise
        if difference := staged.difference(info, just_restored="swapped" not in state):
            raise ComparisonError(f"{self.name}: the server loaded {difference}")
        if staged.aclfile:
            compare_users(self, staging)

    def revert(self, restore: Restore) -> None:
        staging = self._find(restore)
        if staging is not None and "old" in self._state(staging):
            staged = self._staged(staging)
            self.service.stop()
            if staged.aclfile:
                self.sh(REVERT_USERS, staging, staged.aclfile)
            self.sh(REVERT, staging, *staged.names)
            if staged.running:
                self.start_service()
                self.loaded()
        self.settle(restore)

    def settle(self, restore: Restore) -> None:
        self.sh(DROP, *self._candidates(restore))

    def _reason(self, restore: Restore) -> str:
        """Say why a scratch server cannot load the backup either; nothing when it can."""
        try:
            self.rehearse(restore)
        except (IntegrityError, ComparisonError) as error:
            return str(error)
        except BackupError:
            pass  # that no scratch server can be had says nothing about the backup
        return ""

    def preflight(self) -> list[Finding]:
        return preflight_server(self)

    def check(self, part: Part, chunks: Iterator[bytes]) -> None:
        """Have redis-check-rdb or redis-check-aof read it where the component lives.

        The one counts the keys, which are compared with the record; the other needs the whole as a temporary file.
        Users are loaded by a scratch server.
        """
        if part.kind == USERS:
            check_users(self, part, chunks)
            return
        if part.kind == RDB:
            reading = checked(self.runtime, self.server, chunks, name=part.name)
            self._compare(part, read_through(reading).holds, "found")
            return
        try:
            self.sh(CHECK_AOF, self.server, chunks=chunks)
        except CommandFailed as error:
            raise IntegrityError(f"{part.name}: {error.stderr}") from error

    def rehearse(self, restore: Restore) -> dict[str, Any]:
        """Load it into a scratch server where the component lives, and compare the keys of each database.

        That server needs the memory that the data takes, and disk for the file in the folder of temporary files.
        """
        part = self._part(restore.parts)
        loaded = load(self, restore.read(part), form="rdb" if part.kind == RDB else "aof")
        self._compare(part, loaded.holds, "loaded")
        found = {"loaded_by": f"redis-server {loaded.server_version}", "databases": loaded.databases}
        if users := self._users(restore.parts):
            found["users"] = check_users(self, users, restore.read(users)).names
        return found

    def _compare(self, part: Part, found: Mapping[str, Any], verb: str) -> None:
        for count in ("keys", "expires", "databases", "expiring"):
            if count in part.holds and count in found and part.holds[count] != found[count]:
                raise ComparisonError(
                    f"{self.name}: {described(found[count])} {count} {verb}, {described(part.holds[count])} recorded"
                )

    def _part(self, parts: Sequence[Part]) -> Part:
        data = [part for part in parts if part.kind in (RDB, AOF)]
        if len(data) != 1 or any(part.kind not in (RDB, AOF, USERS) for part in parts):
            kinds = ", ".join(part.kind for part in parts) or "nothing"
            raise Permanent(f"{self.name}: expected one {RDB} or {AOF}, got {kinds}")
        return data[0]

    def _users(self, parts: Sequence[Part]) -> Part | None:
        """Return the part with the users, when there is one and the settings want it."""
        return next((part for part in parts if part.kind == USERS and self.users), None)

    def _staging(self, folder: PurePosixPath, restore: Restore) -> PurePosixPath:
        return folder / f".ai-micro-backup-{part_name(restore.run_id)}"

    def _candidates(self, restore: Restore) -> list[PurePosixPath]:
        folders = USUAL_FOLDERS if self.data_dir is None else (self.data_dir,)
        return [self._staging(folder, restore) for folder in folders]

    def _find(self, restore: Restore) -> PurePosixPath | None:
        return next((staging for staging in self._candidates(restore) if self._state(staging)), None)

    def _state(self, staging: PurePosixPath) -> set[str]:
        return set(self.sh('[ ! -d "$1" ] || ls -A "$1"', staging).splitlines())

    def _staged(self, staging: PurePosixPath) -> Staged:
        return Staged(**json.loads(self.sh('cat "$1"', staging / "staged.json")))


def described(count: int | Mapping[str, int]) -> str:
    """Return a count, or those of the databases, for people."""
    if isinstance(count, int):
        return str(count)
    return ", ".join(f"{database} {keys}" for database, keys in sorted(count.items())) or "no"
