"""The runbook's own archives, made by its own commands: taken in where they lie, verified, restored and compared."""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import redis

from tasks import archive
from tasks.imports import take_in
from tasks.rebuild import take_in as rebuild
from tasks.surveys import survey
from tasks.verify import compare_object
from tests.configured import configured
from tests.conftest import Served
from tests.postgres_servers import postgres_server as own_postgres
from tests.redis_servers import PASSWORD, PROGRAMS, Server
from workers import catalog
from workers.catalog import database
from workers.component import Restore
from workers.errors import IntegrityError
from workers.locks import Lease
from workers.settings import Settings
from workers.storage import open_store
from workers.storage.local import LocalStore

NOW = "20250930_020000"
SETTINGS = """
hosts = ["main"]
[system]
name = "ai-micro-service"
[components.postgres]
kind = "postgres"
host = "main"
[components.redis]
kind = "redis"
host = "main"
[components.uploads]
kind = "files"
host = "main"
path = "{live}/app/uploads"
[components.keys]
kind = "files"
host = "main"
path = "{live}/app/keys"
[components.config]
kind = "config"
host = "main"
root = "{live}/srv"
paths = ["api/.env", "api/docker-compose.yml"]
[store]
path = "{store}"
[catalog]
url = "sqlite:///{store}.sqlite"
"""
NOISE = random.Random(1).randbytes(2000)
DOCUMENT = NOISE.hex()
FULL = f"full_system/full_backup_{NOW}.tar.gz"


class Held:
    """A lease that is held."""

    def check(self) -> None:
        return


HELD = cast("Lease", Held())


def sh(script: str, folder: Path, **variables: str) -> None:
    subprocess.run(
        ["bash", "-ec", script], cwd=folder, check=True, env={**os.environ, **variables}, capture_output=True
    )


@pytest.fixture(scope="module")
def runbook(tmp_path_factory: pytest.TempPathFactory, postgres_server: Served, redis_server: Served) -> Path:
    """What the runbook's commands leave below /backups, of real servers and folders."""
    folder = tmp_path_factory.mktemp("runbook")
    live, backups = folder / "live", folder / "backups"
    for path, text in {
        "app/uploads/a/doc.txt": DOCUMENT,
        "app/keys/private.pem": "key",
        "srv/api/.env": "SECRET=1",
        "srv/api/docker-compose.yml": "services: {}",
    }.items():
        (live / path).parent.mkdir(parents=True, exist_ok=True)
        (live / path).write_text(text)
    root = backups / "full_system" / NOW
    root.mkdir(parents=True)
    sh(
        """
        psql() { "$BIN/psql" -q -h 127.0.0.1 -p $PGPORT -U postgres -d postgres "$@"; }
        psql -c "CREATE TABLE runbook_import AS SELECT gen_random_uuid() FROM generate_series(1, 100)"
        "$BIN/pg_dumpall" -h 127.0.0.1 -p $PGPORT -U postgres > all_databases_$NOW.sql
        gzip all_databases_$NOW.sql
        "$BIN/pg_dump" -h 127.0.0.1 -p $PGPORT -U postgres -d postgres --format=custom --compress=9 --file=postgres_$NOW.dump
        mkdir ../../files; mkdir ../../files/20250930
        cp -a "$LIVE/app/uploads" ../../files/20250930/uploads
        cp -a "$LIVE/app/keys" ../../files/20250930/auth-keys
        (cd ../../files; tar -czf "files_backup_$NOW.tar.gz" 20250930) # and the folder stays
        cp ../../files/files_backup_$NOW.tar.gz .
        tar -czf config_$NOW.tar.gz -C "$LIVE/srv" --exclude=node_modules api/.env api/docker-compose.yml
        mkdir ../../postgres; cp all_databases_$NOW.sql.gz ../../postgres
        "$BIN/pg_dump" -h 127.0.0.1 -p $PGPORT -U postgres -d postgres | gzip >../../postgres/postgres.sql.gz
        psql -c "DROP TABLE runbook_import"
        mkdir ../../postgres/20250930; cp postgres_$NOW.dump ../../postgres/20250930
        mkdir pg; mv postgres_$NOW.dump pg; (cd pg; tar -czf ../../../postgres/postgres_backup_$NOW.tar.gz .); rm -r pg
        """,
        root,
        BIN=str(postgres_server.bin_dir), PGPORT=str(postgres_server.port), PGPASSWORD=postgres_server.password,
        NOW=NOW, LIVE=str(live),
    )  # fmt: skip
    with redis.Redis(port=redis_server.port, password=redis_server.password) as server:
        server.set("session", "1")
        server.save()
        data = str(server.config_get("dir")["dir"]), str(server.config_get("dbfilename")["dbfilename"])
        server.flushdb()
    sh('cp "$RDB" redis_$NOW.rdb; gzip redis_$NOW.rdb', root, RDB="/".join(data), NOW=NOW)
    sh(
        """
        echo started > backup.log
        cat > metadata.json <<END
{
  "backup_time": "2025-09-30T11:00:00+09:00",
  "system_version": "1.0.0",
  "components": {
    "postgresql": "$(ls all_databases_*.sql.gz | wc -l) files",
    "redis": "$(ls redis_*.rdb.gz | wc -l) files",
    "files": "1 files",
    "config": "1 files"
  }
}
END
        cd ..; tar -czf "full_backup_$NOW.tar.gz" $NOW # and the folder stays
        """,
        root,
        NOW=NOW,
    )
    return folder


@pytest.fixture
def settings(runbook: Path, tmp_path: Path) -> Iterator[Settings]:
    """Settings with a copy of the runbook's store and of what is live."""
    sh('cp -a "$FROM/." .', tmp_path, FROM=str(runbook))
    (tmp_path / "backup.toml").write_text(SETTINGS.format(live=tmp_path / "live", store=tmp_path / "backups"))
    with configured(tmp_path / "backup.toml") as found:
        yield found
        database.engine_of(found.catalog, os.getpid()).dispose()
        database.engine_of.cache_clear()


def restore(settings: Settings, key: str, name: str) -> None:
    store, component = open_store(settings.store), settings.components[name]
    metadata = archive.verify(store, archive.resolve(store, key))
    parts = [part for part in metadata.parts if part.component == name]
    work = Restore("r", parts, lambda part: archive.read_part(store, key, part))
    component.stage(work)
    component.swap(work)
    component.settle(work)


def test_all_that_the_runbook_writes_is_imported_listed_and_restored(
    settings: Settings, tmp_path: Path
) -> None:
    store = open_store(settings.store)
    done = take_in(store, "", [], HELD)

    unpacked = f"full_system/{NOW}"
    reasons = {
        "files/20250930/": "a copy of folders, of which files_backup_*.tar.gz is made: import that",
        f"{unpacked}/backup.log": "it describes the files of a full backup",
        f"{unpacked}/metadata.json": "it describes the files of a full backup",
        # As a verification would say of them.
        f"{unpacked}/config_{NOW}.tar.gz": "an archive has at least 1000",
        f"{unpacked}/redis_{NOW}.rdb.gz": "an archive has at least 1000",
    }
    assert done["refused"].keys() == reasons.keys()
    assert [key for key, reason in reasons.items() if reason not in done["refused"][key]] == []
    loose = [
        f"files/files_backup_{NOW}.tar.gz",
        f"postgres/all_databases_{NOW}.sql.gz",
        f"postgres/postgres_backup_{NOW}.tar.gz",
        f"postgres/20250930/postgres_{NOW}.dump",
        "postgres/postgres.sql.gz",
        f"{unpacked}/files_backup_{NOW}.tar.gz",
        f"{unpacked}/all_databases_{NOW}.sql.gz",
    ]
    assert sorted(done["imported"]) == sorted([FULL, *loose])
    rows = {row.key: row for row in catalog.list_artifacts()}
    assert rows.keys() == {FULL, *loose}
    assert archive.resolve(store, "latest") == FULL, "not a file of it"
    assert f"{rows[FULL].created:%Y-%m-%d %H:%M}" == "2025-09-30 02:00", "its own time, in its own zone"
    metadata = archive.read_metadata(store, FULL)
    assert metadata.components == dict.fromkeys(("postgresql", "redis", "files", "config"), "1 files")
    assert {(part.component, part.kind) for part in metadata.parts} == {
        ("postgres", "postgres-plain"), ("redis", "redis-rdb"), ("uploads", "files-tar"), ("keys", "files-tar"),
        ("config", "files-tar"),
    }  # fmt: skip
    (dump,) = archive.read_metadata(store, loose[2]).parts
    assert (dump.kind, dump.holds) == ("postgres-dump", {"database": "postgres"})
    (plain,) = archive.read_metadata(store, "postgres/postgres.sql.gz").parts
    assert (plain.kind, plain.holds) == ("postgres-plain", {"database": "postgres"})
    for key in rows:
        archive.verify(store, key)
        compare_object(store, key, progress=None)

    live = tmp_path / "live"
    for path in ("app/uploads/a/doc.txt", "app/keys/private.pem", "srv/api/.env"):
        (live / path).write_text("damaged")
    for name in ("uploads", "keys", "config"):
        restore(settings, FULL, name)
    assert (live / "app/uploads/a/doc.txt").read_text() == DOCUMENT
    assert (live / "app/keys/private.pem").read_text() == "key"
    assert (live / "srv/api/.env").read_text() == "SECRET=1"
    (live / "app/keys/private.pem").unlink()
    restore(settings, loose[0], "keys")
    assert (live / "app/keys/private.pem").read_text() == "key"

    again = take_in(store, "", [], HELD)
    assert (again["imported"], sorted(again["known"])) == ([], sorted(rows))
    assert rebuild(store, drop_gone=False) == {"added": [], "changed": [], "gone": [], "notes": []}
    assert not survey("store").plan.dropped, "archives that somebody brought are kept"


def test_what_is_damaged_or_unknown_is_named_and_not_imported(settings: Settings, tmp_path: Path) -> None:
    backups = tmp_path / "backups"
    plain = gzip.decompress((backups / f"postgres/all_databases_{NOW}.sql.gz").read_bytes())
    for folder in ("files/20250930", f"full_system/{NOW}", "postgres/20250930"):
        shutil.rmtree(backups / folder)
    bad = {
        f"postgres/all_databases_{NOW}.sql.gz": gzip.compress(plain[: len(plain) // 2]),
        "postgres/notes.txt": b"what is this",
        "postgres/authdb.sql.gz": gzip.compress(b"--\n-- PostgreSQL database dump\n" + NOISE),
        "redis/redis_20250930_020000.rdb.gz": gzip.compress(b"no snapshot" + NOISE),
        "redis/aof/appendonly_20250930_020000.aof.gz": gzip.compress(NOISE),
        "redis/aof/appendonly_20250930_030000.aof": b"*1\r\n",
        "postgres/base_backup.tar.gz": (backups / f"files/files_backup_{NOW}.tar.gz").read_bytes(),
        "config/config_20250930_020000.tar.gz": (backups / f"files/files_backup_{NOW}.tar.gz").read_bytes()[:-40],
        FULL: (backups / FULL).read_bytes()[:-20],
    }  # fmt: skip
    for key, content in bad.items():
        (backups / key).parent.mkdir(exist_ok=True)
        (backups / key).write_bytes(content)
    before = {path for path in backups.rglob("*") if path.is_file()}

    done = take_in(open_store(settings.store), "", [], HELD)

    assert done["refused"].keys() == bad.keys()
    reasons = done["refused"]
    assert "is cut short" in reasons[f"postgres/all_databases_{NOW}.sql.gz"]
    assert "is cut short" in reasons["postgres/authdb.sql.gz"]
    assert "does not begin as redis-rdb does" in reasons["redis/redis_20250930_020000.rdb.gz"]
    assert "does not begin as redis-aof does" in reasons["redis/aof/appendonly_20250930_020000.aof.gz"]
    assert "has 4 bytes, an archive has at least" in reasons["redis/aof/appendonly_20250930_030000.aof"]
    assert "it holds no PG_VERSION" in reasons["postgres/base_backup.tar.gz"]
    assert "no name that the runbook's scripts give" in reasons["postgres/notes.txt"]
    assert {row.key for row in catalog.list_artifacts()} == set(done["imported"])
    written = {path for path in backups.rglob("*") if path.is_file()} - before
    assert len(written) == len(done["imported"]) == 3


def test_damage_after_the_import_is_found(settings: Settings, tmp_path: Path) -> None:
    store = open_store(settings.store)
    take_in(store, "full_system/", [], HELD)
    path = tmp_path / "backups" / FULL
    content = path.read_bytes()
    path.write_bytes(content[:-200] + bytes([content[-200] ^ 1]) + content[-199:])
    with pytest.raises(IntegrityError):
        archive.verify(store, FULL)


def test_where_several_components_could_be_meant_nothing_is_guessed(
    settings: Settings, tmp_path: Path
) -> None:
    other = '[components.redis2]\nkind = "redis"\nhost = "main"\n'
    toml = tmp_path / "backup.toml"
    toml.write_text(toml.read_text() + other)
    with configured(toml) as found:
        store = open_store(found.store)
        (reason,) = take_in(store, "full_system/full", [], HELD)["refused"].values()
        assert "of the kind redis (redis, redis2); say which: --component" in reason
        chosen = ["postgres", "redis2", "uploads", "keys", "config"]
        assert take_in(store, "full_system/full", chosen, HELD)["imported"] == [FULL]
        parts = archive.read_metadata(store, FULL).parts
        assert [part.component for part in parts if part.kind == "redis-rdb"] == ["redis2"]


def test_the_runbooks_databases_come_back_with_owners_and_rights_and_no_row_twice(tmp_path: Path) -> None:
    with own_postgres(18, tmp_path / "pg") as server:
        server.execute("CREATE ROLE app LOGIN; CREATE ROLE readonly")
        server.execute("CREATE DATABASE authdb OWNER app")
        server.execute(
            "CREATE TABLE logins AS SELECT n FROM generate_series(1, 3000) n; ALTER TABLE logins OWNER TO app;"
            "GRANT SELECT ON logins TO readonly",
            "authdb",
        )
        backups = tmp_path / "backups"
        (backups / "postgres").mkdir(parents=True)
        key = f"postgres/all_databases_{NOW}.sql.gz"
        (backups / key).write_bytes(gzip.compress(server.program("pg_dumpall")))
        server.execute("DELETE FROM logins WHERE n > 7; REVOKE ALL ON logins FROM readonly", "authdb")
        table = {**server.settings("postgres", "main"), "kind": "postgres", "databases": ["authdb"]}
        secret = json.dumps(table.pop("password")["file"])
        lines = [f"{name} = {json.dumps(value)}" for name, value in table.items() if name != "name"]
        (tmp_path / "backup.toml").write_text(
            f"""
hosts = ["main"]
[system]
name = "ai-micro-service"
[store]
path = {json.dumps(str(backups))}
[catalog]
url = "sqlite:///{tmp_path / "catalog.sqlite"}"
[components.postgres]
password = {{ file = {secret} }}
"""
            + "\n".join(lines)
        )
        with configured(tmp_path / "backup.toml") as settings:
            done = take_in(open_store(settings.store), "", [], HELD)
            assert done["imported"] == [key], done
            restore(settings, key, "postgres")

        assert server.rows("SELECT count(*), count(DISTINCT n) FROM logins", "authdb") == [(3000, 3000)]
        assert server.rows(
            "SELECT tableowner, has_table_privilege('readonly', 'logins', 'SELECT') FROM pg_tables "
            "WHERE tablename = 'logins'",
            "authdb",
        ) == [("app", True)]


@pytest.mark.parametrize("version", PROGRAMS)
def test_the_runbooks_keys_come_back(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    server = Server(tmp_path / "redis", PROGRAMS[version], appendonly="yes", aof_use_rdb_preamble="no")
    server.start()
    try:
        with server.client() as client:
            client.mset({f"session:{number}": number for number in range(500)})
            client.save()
            snapshot = (server.data / "dump.rdb").read_bytes()
            client.set("later", "1")
            written = b"".join(path.read_bytes() for path in sorted(server.data.rglob("*.aof")))
            client.flushall()
            client.set("other", "1")
        store = LocalStore(tmp_path / "backups")
        keys = {
            f"redis/20250930/redis_{NOW}.rdb.gz": (gzip.compress(snapshot), 500),
            f"redis/aof/appendonly_{NOW}.aof.gz": (gzip.compress(written), 501),
        }
        for key, (content, _) in keys.items():
            store.put(key, [content])
        component = server.component(name="redis")
        lines = f"""
hosts = ["main"]
[system]
name = "ai-micro-service"
[store]
path = "{tmp_path / "backups"}"
[catalog]
url = "sqlite:///{tmp_path / "catalog.sqlite"}"
[components.redis]
kind = "redis"
host = "main"
"""
        (tmp_path / "backup.toml").write_text(lines)
        with configured(tmp_path / "backup.toml") as settings:
            assert take_in(store, "", [], HELD)["imported"] == sorted(keys)
            known = settings.model_copy(update={"components": {"redis": component}})
            for key, (_, count) in keys.items():
                (part,) = archive.read_metadata(store, key).parts
                component.check(part, archive.read_part(store, key, part))
                restore(known, key, "redis")
                with server.client() as client:
                    assert (client.dbsize(), client.get("session:499")) == (count, b"499")
                    assert client.get("later") == (b"1" if count == 501 else None)
                    client.set("other", "1")
            torn = f"redis/aof/appendonly_{NOW}.aof"  # gzip was given the name of another second
            store.put(torn, [written[:-3]])
            take_in(store, "", [], HELD)
            (part,) = archive.read_metadata(store, torn).parts
            with pytest.raises(IntegrityError, match="redis-check-aof ended with status"):
                component.check(part, archive.read_part(store, torn, part))
    finally:
        assert server.do("stop")
