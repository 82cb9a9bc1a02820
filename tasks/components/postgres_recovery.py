"""Recovery of a PostgreSQL cluster from a base backup and the WAL after it, beside the live data folder, then a swap.

A server of the base backup's own version recovers the unpacked folder, on a private socket and with settings of its own:
it archives nothing, loads no libraries and replicates nothing. It asks for one WAL file after another, which come from the
store a few at a time, each checked on its way. Only what it recovered to the target is put in place.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from tasks.components.postgres_base import BASE
from tasks.components.postgres_cluster import IDENTIFIER, require_same_cluster
from tasks.components.postgres_options import RestoreOptions
from tasks.components.postgres_recovery_scripts import (
    ARRANGE,
    CHECK_BLOCKS,
    FETCH,
    FIND_PROGRAMS,
    FINISH,
    LOOK,
    MAKE,
    REQUIRE_PLACE,
    STAGED,
)
from tasks.components.postgres_segments import parse_lsn
from tasks.components.postgres_target import Reached, Target, describe
from tasks.components.postgres_unpack import room, sh, unpack
from tasks.components.postgres_wal import list_collections, list_wal
from tasks.components.postgres_wal_feed import WalFeed
from tasks.components.trees import Tree
from workers.component import Part, Restore
from workers.errors import (
    CommandFailed,
    ComparisonError,
    Permanent,
    RuntimeUnavailable,
)

if TYPE_CHECKING:
    from tasks.components.postgres import Component
    from tasks.components.psql import Server

SCRIPT = Path(__file__).with_suffix(".sh").read_text()
IN_CONTAINERS = PurePosixPath("/var/lib/postgresql/data")
ANSWER_SECONDS = 300.0
"""How long the live server may take to answer after the swap."""
PAUSE_SECONDS = 0.5


def is_base(parts: Iterable[Part]) -> bool:
    """Say whether a restore of ``parts`` is a recovery from a base backup."""
    return any(part.kind == BASE for part in parts)


@dataclass(frozen=True)
class Recovery:
    """One restore of one component from a base backup. Its four steps keep the promises of `BaseComponent`."""

    component: Component
    restore: Restore

    @cached_property
    def options(self) -> RestoreOptions:
        return RestoreOptions.model_validate(dict(self.restore.options))

    @property
    def chain(self) -> list[Part]:
        """The base backup, and after it the increments that lead to the last of them."""
        return [part for part in self.restore.parts if part.kind == BASE]

    @property
    def part(self) -> Part:
        """The base backup that is recovered from, of the newest state."""
        return self.chain[-1]

    @property
    def live(self) -> PurePosixPath:
        """The data folder of the live server. Raises ``Permanent`` when the settings do not say it."""
        if self.component.data_dir is not None:
            return self.component.data_dir
        if self.component.container is None:
            raise Permanent(f"{self.component.name}: a recovery needs the data folder; set data_dir")
        return IN_CONTAINERS

    @property
    def root(self) -> PurePosixPath:
        return self.options.folder or self.live

    @property
    def tree(self) -> Tree:
        return Tree(self.component.runtime, self.component.name, self.root, base="data")

    @property
    def staging(self) -> PurePosixPath:
        return self.tree.staging(self.restore)

    def would_overwrite(self) -> str:
        """Return a line for the plan. Raises ``Permanent`` for a recovery that would be refused."""
        self._require_possible(self._programs())
        holds = self.part.holds
        beside = f" (an incremental one; with {', '.join(holds['needs'])})" if "needs" in holds else ""
        base = f"the base backup of {holds['finished']}{beside}, recovered {describe(self.options)}"
        if self.options.folder:
            return f"nothing: {self.component.name} would be recovered into {self.root} from {base}"
        there = "the whole cluster" if self._exists_at(self.live / "PG_VERSION") else "nothing is there,"
        return f"{self.component.name}: {there} in {self.live}, would be replaced by {base}"

    # -- the steps ----------------------------------------------------------------------------------------------

    def stage(self) -> None:
        """Unpack the base backup beside what is there, compare it with its manifest and recover it to the target."""
        programs = self._programs()
        if not self._exists("staged"):
            self._require_possible(programs)
        if not self.tree.prepare(self.restore):
            self._sh(MAKE, self.staging)
            unpack(self.component.runtime, self.chain, self.restore.read, self.staging, programs)
            reached = self._recover(programs)
            self._sh(FINISH, self.live, self.staging, "scratch" if self.options.folder else "live")
            self._note("reached.json", reached.model_dump_json())
            self.tree.staged(self.restore)
        self.restore.found["reached"] = self._reached().model_dump(mode="json")
        if self.options.folder:
            start = f"pg_ctl -D {self.options.folder} -o '-p 5433' start"
            self.restore.found["start"] = f"as the server's user: {programs}/{start}"

    def rehearse(self) -> dict[str, Any]:
        """Recover it to its own end beside what is live, compare, read every block, and remove it; return what was compared."""
        programs = self._programs()
        self.tree.revert(self.restore)  # what an earlier one left that was killed
        try:
            self._require_room()
            self.tree.prepare(self.restore)
            self._sh(MAKE, self.staging)
            unpack(self.component.runtime, self.chain, self.restore.read, self.staging, programs)
            reached = self._recover(programs)
            if lost := set(self.part.holds.get("databases", ())) - set(reached.databases):
                raise ComparisonError(f"{self.part.name}: recovered without {', '.join(sorted(lost))}")
            try:
                blocks = self._sh(CHECK_BLOCKS, programs, self.staging / "new/data").strip()
            except CommandFailed as error:
                raise ComparisonError(f"{self.part.name}: recovered with damage: {error.stderr}") from error
        finally:
            self.tree.revert(self.restore)
        found = {"databases": sorted(reached.databases), "lsn": reached.lsn, "base_backups": len(self.chain)}
        return found | {"blocks": int(blocks) if blocks else "without checksums"}

    def swap(self) -> None:
        """Stop the server, put the recovered data folder in its place, start it and compare."""
        if self.options.folder:
            self.tree.swap(self.restore)
            return
        if not self._exists("staged"):
            raise Permanent(f"{self.component.name}: nothing is staged in {self.staging}")
        service = self.component.service
        if not self._exists("stopping"):
            self._note("stopping", "running" if service.is_running() else "down")
        service.stop()
        self.tree.swap(self.restore)
        service.start()
        self._compare(self._reached())

    def revert(self) -> None:
        """Bring back the data folder that stood before, and the server on it; fine when nothing was changed."""
        if self.options.folder or not self._exists("stopping"):
            self.tree.revert(self.restore)
            return
        service = self.component.service
        service.stop()
        self.tree.bring_back(self.restore)
        if self._read("stopping") == "running":
            service.start()
        # Last, because it removes what tells another attempt that the server has to be started.
        self.tree.revert(self.restore)

    def settle(self) -> None:
        self.tree.settle(self.restore)

    # -- helpers ------------------------------------------------------------------------------------------------

    def _require_possible(self, programs: str) -> None:
        component = self.component
        if self.options.folder is None:
            if component.container is None and not (component.start and component.stop and component.status):
                raise Permanent(f"{component.name}: a recovery needs the commands start, stop and status")
            self._require_same_cluster(programs)
        elif self._sh(
            '[ ! -e "$1" ] || ls -A "$1" | grep -v "^\\.ai-micro-backup-" || true', self.root
        ).strip():
            raise Permanent(
                f"{component.name}: {self.root} is there and not empty; recover into a new folder"
            )
        self._require_room()

    def _require_room(self) -> None:
        component = self.component
        where = "container" if component.container and self.options.folder is None else "host"
        try:
            self._sh(REQUIRE_PLACE, self.root, room(self.chain) // 1024, where)
        except CommandFailed as error:
            raise Permanent(f"{component.name}: {self.root}: {error.stderr}") from error

    def _require_same_cluster(self, programs: str) -> None:
        """Refuse a data folder of another cluster, unless its server answers and holds no table, as a new one does."""
        component, recorded = self.component, str(self.part.holds["system_identifier"])
        found = self._sh(LOOK, self.live, programs).strip()
        if found in ("", recorded) or self.options.new_cluster:
            return
        with contextlib.suppress(RuntimeUnavailable):
            server = component.server(component.maintenance_database)
            with server.session(component.maintenance_database) as session:
                if str(session.value(IDENTIFIER)) == found:
                    require_same_cluster(server, session, component.place, [self.part])
                    return
        raise Permanent(
            f"{component.name}: {self.live} is another cluster than the one backed up: its system identifier is "
            f"{found}, the backup's {recorded}; and its server does not answer to say whether it is in use. Is the "
            "recovery aimed at the wrong server? If this one was set up anew in its place, recover with "
            "--onto-new-cluster (option new_cluster)"
        )

    def _programs(self) -> str:
        major = re.split(r"\D", str(self.part.holds["server_version"]))[0]
        try:
            return self._sh(FIND_PROGRAMS, major, self.component.bin_dir or "").strip()
        except CommandFailed as error:
            raise Permanent(f"{self.component.name}: {error.stderr}") from error

    def _recover(self, programs: str) -> Reached:
        store, part = self.restore.store, self.part
        if store is None:
            raise Permanent("a recovery needs the store that holds the WAL")
        system = str(part.holds["system_identifier"])
        wal = list_wal(store, self.component.name, system)
        target = Target.of(
            self.options, wal, list_collections(store, self.component.name, system), part.holds
        )
        target.require_wal(wal, part.holds)
        timestamps, uid, gid = self._sh(ARRANGE, self.live, self.staging, programs).split()
        work = self.staging / "work"
        fetch = str(work / "fetch.sh").replace("%", "%%")
        settings = {
            "restore_command": f'sh {shlex.quote(fetch)} "%f" "%p"',
            "hba_file": str(work / "pg_hba.conf"),
            "ident_file": str(work / "pg_ident.conf"),
            "track_commit_timestamp": timestamps,
            **target.settings,
            **STAGED,
        }
        lines = [f"{name} = '{value.replace(chr(39), 2 * chr(39))}'\n" for name, value in settings.items()]
        self._put("work/postgresql.conf", "".join(lines))
        self._put("work/pg_hba.conf", "local all all trust\n")
        self._put("work/pg_ident.conf", "")
        folders = [str(self.live / "pg_wal"), *map(str, filter(None, [self.component.wal_archive]))]
        self._put("work/fetch.sh", FETCH.replace("{folders}", shlex.join(folders)))
        feed = WalFeed(
            store,
            wal,
            target.timeline,
            self.component.runtime,
            work / "wal",
            (int(uid), int(gid)),
            target.until,
        )
        words = [programs, str(self.staging / "new/data"), str(work), self.component.user]
        process = self.component.runtime.spawn(["sh", "-c", SCRIPT, "sh", *words], env={"LC_ALL": "C"})
        answers: dict[str, str] = {}
        try:
            for line in _lines(process.output()):
                word, _, text = line.partition(" ")
                if word == "want":
                    process.write(b"have\n" if feed.give(text) else b"none\n")
                else:
                    answers[word] = text
        except CommandFailed as error:
            raise Permanent(f"{self.component.name}: the recovery {target} failed: {error.stderr}") from error
        finally:
            process.kill()
        reached = Reached.of(json.loads(answers["reached"]), answers.get("stopped", ""), str(target))
        target.require(reached)
        if reached.system_identifier != system:
            raise ComparisonError(f"the recovered cluster is {reached.system_identifier}, not {system}")
        return reached

    def _compare(self, reached: Reached) -> None:
        server = self._answering()
        with server.session("template1") as session:
            found = session.rows(
                "SELECT (SELECT system_identifier::text FROM pg_control_system()) AS system_identifier, "
                "pg_is_in_recovery() AS in_recovery, pg_current_wal_lsn() AS lsn, "
                "pg_walfile_name(pg_current_wal_lsn()) AS wal_file, "
                "(SELECT json_agg(datname ORDER BY datname) FROM pg_database) AS databases"
            )[0]
        faults = {
            "is another cluster": found["system_identifier"] != reached.system_identifier,
            "has other databases": found["databases"] != list(reached.databases),
            "is on another timeline": int(found["wal_file"][:8], 16) != reached.timeline,
            "does not hold what was recovered": parse_lsn(found["lsn"]) < parse_lsn(reached.lsn),
        }
        if wrong := [text for text, true in faults.items() if true]:
            raise ComparisonError(f"{self.component.name}: the server that was started {' and '.join(wrong)}")

    def _answering(self) -> Server:
        deadline = time.monotonic() + ANSWER_SECONDS
        while True:
            try:
                return self.component.wal_server()
            except RuntimeUnavailable:
                if time.monotonic() > deadline:
                    raise
            time.sleep(PAUSE_SECONDS)

    def _reached(self) -> Reached:
        return Reached.model_validate_json(self._read("reached.json"))

    def _exists(self, name: str) -> bool:
        return self._exists_at(self.staging / name)

    def _exists_at(self, path: PurePosixPath) -> bool:
        return bool(self._sh('[ ! -e "$1" ] || echo yes', path))

    def _read(self, name: str) -> str:
        return self._sh('cat "$1"', self.staging / name)

    def _note(self, name: str, text: str) -> None:
        self._put("note.new", text)
        self._sh('sync; mv -f "$1" "$2"', self.staging / "note.new", self.staging / name)

    def _put(self, name: str, text: str) -> None:
        self._sh('cat >"$1"; chmod 644 "$1"', self.staging / name, chunks=[text.encode()])

    def _sh(self, script: str, *words: object, chunks: Iterable[bytes] = ()) -> str:
        return sh(self.component.runtime, script, *words, chunks=chunks)


def _lines(chunks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for chunk in chunks:
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.decode() for line in lines)
