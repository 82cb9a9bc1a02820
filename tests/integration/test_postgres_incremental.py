"""Incremental base backups of real servers: made, combined, recovered from, rehearsed, refused, and made full instead."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import pytest

from compose.demo.embedded import free_port
from tasks.components.postgres_incremental import manifest_key
from tests.configured import configured, write_settings
from tests.integration.test_postgres_base import read
from tests.integration.test_postgres_recovery import SETTINGS, Cluster
from tests.postgres_servers import postgres_server
from tests.systems import wait_until
from workers import streams
from workers.catalog import Artifact
from workers.component import Part, Restore
from workers.errors import BackupError, IntegrityError, Permanent

ROWS = 20_000


class Chain:
    """A cluster with base backups of it, the oldest first, and what was in it when each was made."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster, self.server = cluster, cluster.server
        self.parts: list[Part] = []
        self.states: list[list[tuple[Any, ...]]] = []

    @property
    def artifacts(self) -> list[Artifact]:
        return [
            Artifact(
                key=part.name,
                run_id=part.name,
                job="manual",
                created=part.finished,
                size=part.size,
                sha256=part.sha256,
                details={"parts": [part.model_dump(mode="json")]},
            )
            for part in reversed(self.parts)
        ]

    def back_up(self, base: str) -> Part:
        component, store = self.cluster.component, self.cluster.store
        (source,) = component.sources(component.completed({"base": base}, self.artifacts))
        name = f"{len(self.parts)}.tar.zst"
        written = streams.write(store, name, source.chunks, level=1)
        started = datetime.now(UTC)
        part = Part(
            name=name,
            component=component.name,
            host=component.host,
            kind=source.kind,
            codec="zstd",
            **dataclasses.asdict(written),
            started=started,
            finished=started,
            holds=source.holds,
        )
        self.parts.append(part)
        self.states.append(self.state())
        return part

    def state(self, ask: Callable[[str], list[tuple[Any, ...]]] | None = None) -> list[tuple[Any, ...]]:
        ask = ask or self.server.rows
        tables = ask("SELECT relname FROM pg_class WHERE relname LIKE 'shop%' AND relkind = 'r'")
        return [
            (
                name,
                *map(int, ask(f"SELECT count(*) AS n, sum(hashtext(t::text)::bigint) AS s FROM {name} t")[0]),
            )
            for (name,) in sorted(tables)
        ]

    def restore(self, parts: Sequence[Part], **options: Any) -> Restore:
        self.cluster.runs += 1
        store = self.cluster.store
        run = f"20261122_04{self.cluster.runs:04}"
        return Restore(run, parts, lambda part: read(store, part), options, cast("Any", store))

    def leftovers(self) -> list[Path]:
        return list(self.server.data_dir.glob(".ai-micro-backup*"))

    def state_in(self, folder: str, start: str) -> list[tuple[Any, ...]]:
        """Start a server on a recovered folder as its restore says, and return the same of it as `state`."""
        port, server = free_port(), self.server
        command = start.removeprefix("as the server's user: ").replace("5433", str(port))
        if server.container:
            become = ["docker", "exec", "--user", "postgres", server.container]
        else:
            owner = Path(folder).stat()
            become = ["setpriv", f"--reuid={owner.st_uid}", f"--regid={owner.st_gid}", "--clear-groups"]
            become = become if os.geteuid() == 0 else []
        quietly = f"{command} -s -w >/dev/null 2>&1 </dev/null"
        subprocess.run([*become, "sh", "-c", quietly], check=True, timeout=120)
        try:
            return self.state(lambda query: self.ask(port, query))
        finally:
            stop = command.removesuffix("start") + "-m immediate -s stop"
            subprocess.run([*become, "sh", "-c", stop], check=True, timeout=120)

    def ask(self, port: int, query: str) -> list[tuple[Any, ...]]:
        rows = f"SELECT coalesce(json_agg(t), '[]') FROM ({query}) t"
        text = self.server.program(
            "psql", f"--port={port}", "--no-align", "--tuples-only", "--command", rows, "postgres"
        )
        return [tuple(row.values()) for row in json.loads(text)]


@pytest.fixture(scope="module", params=[17, 18])
def chain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chain]:
    folder = Path(tempfile.mkdtemp(prefix="ai-micro-backup-test-"))
    folder.chmod(0o755)
    place = tmp_path_factory.mktemp("incremental")
    with (
        postgres_server(request.param, folder, settings=SETTINGS | {"summarize_wal": "on"}) as server,
        configured(write_settings(place)),
    ):
        made = Chain(Cluster(server, place))
        server.execute(
            f"CREATE TABLE shop AS SELECT g AS id, repeat(md5(g::text), 9) AS text FROM generate_series(1, {ROWS}) g"
        )
        made.back_up("full")
        server.execute("UPDATE shop SET text = 'changed' WHERE id % 5000 = 0")
        server.execute("CREATE TABLE shop_gone AS SELECT 1 AS a")
        made.back_up("incremental")
        server.execute("DROP TABLE shop_gone")
        server.execute("CREATE TABLE shop_new AS SELECT g AS id FROM generate_series(1, 500) g")
        server.execute("DELETE FROM shop WHERE id = 7")
        made.back_up("incremental")
        yield made
    shutil.rmtree(folder)


# -- in this order: what touches nothing first -------------------------------------------------------------------


def test_an_increment_holds_what_changed_and_says_on_what_it_is_based(chain: Chain) -> None:
    full, first, second = chain.parts
    assert [part.holds["base"] for part in chain.parts] == ["full", "incremental", "incremental"]
    assert "needs" not in full.holds
    assert (first.holds["needs"], second.holds["needs"]) == ([full.name], [full.name, first.name])
    held = int(chain.server.rows("SELECT pg_table_size('shop')")[0][0])
    for part in (first, second):
        assert part.plain_size < full.plain_size - held / 2
        chain.cluster.component.check(part, read(chain.cluster.store, part))


def test_rehearsal_recovers_all_of_it_and_leaves_nothing(chain: Chain) -> None:
    started = chain.cluster.started()
    found = chain.cluster.component.rehearse(chain.restore(chain.parts))
    assert found["base_backups"] == 3
    assert set(found["databases"]) >= {"postgres", "template1"}
    if chain.server.rows("SHOW data_checksums") == [("on",)]:
        assert found["blocks"] > 1000
    else:
        assert found["blocks"] == "without checksums"
    assert chain.leftovers() == []
    assert chain.cluster.started() == started


def test_what_does_not_fit_or_is_damaged_touches_nothing(chain: Chain) -> None:
    component, store = chain.cluster.component, chain.cluster.store
    started, before = chain.cluster.started(), chain.state()
    full, first, second = chain.parts
    lacking = chain.restore([full, second])
    with pytest.raises(IntegrityError, match="the increments do not fit"):
        component.stage(lacking)
    component.revert(lacking)
    for damaged, step in ((full, component.stage), (first, component.rehearse), (second, component.stage)):
        stored = store.root / damaged.name
        whole = stored.read_bytes()
        middle = len(whole) // 2
        stored.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        restore = chain.restore(chain.parts)
        with pytest.raises(BackupError):
            step(restore)
        component.revert(restore)
        stored.write_bytes(whole)
    assert (chain.cluster.started(), chain.state(), chain.leftovers()) == (started, before, [])


def test_the_archive_s_own_words_put_the_chain_together(chain: Chain) -> None:
    server, folder = chain.server, chain.server.archive / "by-hand"  # which has the same path in a container
    folder.mkdir()
    for part in chain.parts:
        shutil.copyfile(chain.cluster.store.root / part.name, folder / part.name)
    text = chain.cluster.component.by_hand(chain.parts[-1:])
    for number, part in enumerate(chain.parts[:-1], 1):
        assert f"{number}. `{part.name}`\n" in text
    [commands] = re.findall(r"```sh\n(.*?)```", text, flags=re.DOTALL)
    make, unpack, combine, verify = commands.splitlines()
    of_each = [
        unpack.replace(chain.parts[-1].name, part.name).replace("part3", f"part{number}")
        for number, part in enumerate(chain.parts, 1)
    ]
    inside = ["docker", "exec", "--workdir", str(folder), server.container] if server.container else []
    env = {**os.environ, "PATH": f"{server.bin_dir}{os.pathsep}{os.environ['PATH']}"}
    said = ""
    # The wheel's pg_verifybackup 18 crashes on every base backup, full ones as well.
    combined = [combine, verify if server.container else "echo no pg_verifybackup"]
    for place, lines in (([], [make, *of_each]), (inside, combined)):
        words = [*place, "sh", "-euc", "\n".join(lines)]
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        said += done.stdout
    assert said.strip() == ("backup successfully verified" if server.container else "no pg_verifybackup")
    assert (folder / "data/backup_manifest").stat().st_size > 10_000
    shutil.rmtree(folder)


def test_without_its_parents_manifest_it_becomes_a_full_one(chain: Chain) -> None:
    store, newest = chain.cluster.store, chain.parts[-1]
    system, sha256 = newest.holds["system_identifier"], newest.holds["manifest_sha256"]
    kept = store.root / manifest_key(chain.cluster.component.name, system, sha256)
    text = kept.read_bytes()
    for damage in (text[:-9], None):
        kept.unlink() if damage is None else kept.write_bytes(damage)
        chain.back_up("incremental")
        instead = chain.parts.pop()
        chain.states.pop()
        (store.root / instead.name).unlink()
        assert instead.holds["base"] == "full"
        assert "the manifest of the newest base backup is of no use" in instead.holds["warnings"][0]
        assert "needs" not in instead.holds
    kept.write_bytes(text)


def test_recovery_brings_back_the_moment_of_the_last_one_and_wal_goes_on_from_there(chain: Chain) -> None:
    server, cluster = chain.server, chain.cluster
    server.execute("INSERT INTO shop VALUES (0, 'after the increments')")
    latest = chain.state()
    cluster.collect()
    server.execute("DROP TABLE shop, shop_new")

    beside = server.data_dir.parent if server.container is None else Path("/var/lib/postgresql")
    folder = str(beside / "scratch")
    cluster.put_back(restore := chain.restore(chain.parts, latest=True, folder=folder))
    assert chain.state_in(folder, restore.found["start"]) == latest
    assert chain.state() == []

    restore = chain.restore(chain.parts)
    (plan,) = cluster.component.overwrites(chain.parts)
    assert f"an incremental one; with {chain.parts[0].name}, {chain.parts[1].name}" in plan
    cluster.put_back(restore)
    assert chain.state() == chain.states[2]
    assert chain.leftovers() == []

    chain.back_up("incremental")  # of a server that has left the timeline of its parents
    assert chain.parts[-1].holds["base"] == "full"
    assert "is of timeline 1" in chain.parts[-1].holds["warnings"][0]
    assert chain.back_up("incremental").holds["needs"] == [chain.parts[-2].name]


def test_where_summaries_of_wal_are_missing_it_becomes_a_full_one(chain: Chain) -> None:
    server = chain.server
    server.execute("INSERT INTO shop VALUES (-1, 'of which no summary tells')")
    server.execute("SELECT pg_switch_wal()")
    server.execute("CHECKPOINT")
    parent = chain.parts[-1].holds
    later = f"SELECT 1 FROM pg_available_wal_summaries() WHERE end_lsn > '{parent['stop_lsn']}'"
    assert wait_until(lambda: bool(server.rows(later)), timeout=60)
    for file in (server.data_dir / "pg_wal/summaries").iterdir():
        file.unlink()
    made = chain.back_up("incremental")
    assert made.holds["base"] == "full"
    assert "WAL summaries" in made.holds["warnings"][0]


@pytest.mark.parametrize(
    ("major", "refused"),
    [(15, "need PostgreSQL 17 or later, and this is 15"), (18, "need summarize_wal, which is off")],
)
def test_a_server_that_makes_none_is_told_so(major: int, refused: str, tmp_path: Path) -> None:
    with postgres_server(major, tmp_path) as server:
        chain = Chain(Cluster(server, tmp_path))
        with pytest.raises(Permanent, match=refused):
            chain.back_up("incremental")
        component = chain.cluster.component
        advice = component.model_copy(update={"incremental": True}).preflight()
        assert any("incremental" in finding.what and finding.change for finding in advice)
        assert not any("incremental" in finding.what for finding in component.preflight())
