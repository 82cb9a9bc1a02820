"""Base backups of real servers: what they hold, and that neither damage nor a want of WAL passes."""

from __future__ import annotations

import dataclasses
import io
import tarfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tasks.components.postgres import Component
from tasks.components.postgres_base import check_base
from tasks.components.postgres_wal import BaseBackup
from tests.postgres_servers import Postgres, postgres_server
from workers import streams
from workers.component import Part
from workers.errors import IntegrityError, Permanent
from workers.storage.local import LocalStore


def back_up(component: Component, store: LocalStore) -> Part:
    """Store a base backup of the component and return its record."""
    (source,) = component.sources({"base": "full"})
    written = streams.write(store, f"{source.name}.zst", source.chunks, level=1)
    return Part(
        name=f"{source.name}.zst",
        component=component.name,
        host=component.host,
        kind=source.kind,
        codec="zstd",
        **dataclasses.asdict(written),
        started=datetime.now(UTC),
        finished=datetime.now(UTC),
        holds=source.holds,
    )


def read(store: LocalStore, part: Part) -> Iterator[bytes]:
    return streams.read(store.get(part.name), codec=part.codec, written=part.written, name=part.name)


@pytest.fixture(params=[15, 17, 18])
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Postgres]:
    with postgres_server(request.param, tmp_path) as started:
        yield started


def test_base_backup_is_whole_and_says_what_it_is(server: Postgres, tmp_path: Path) -> None:
    component = Component.model_validate(server.settings())
    store = LocalStore(tmp_path / "store")
    part = back_up(component, store)
    plain = b"".join(read(store, part))

    base = BaseBackup.of("archive", part.holds)
    assert base.system_identifier == str(
        server.rows("SELECT system_identifier FROM pg_control_system()")[0][0]
    )
    assert base.timeline == 1
    assert 0 < base.start_lsn < base.stop_lsn
    assert base.with_wal
    assert server.rows("SELECT count(*) FROM pg_replication_slots") == [(0,)]
    component.check(part, iter([plain]))

    with tarfile.open(fileobj=io.BytesIO(plain)) as tar:
        names = tar.getnames()
        offset = tar.getmember("global/pg_control").offset_data
    assert {"PG_VERSION", "backup_label", "backup_manifest"} <= set(names)
    flipped = plain[:offset] + bytes([plain[offset] ^ 1]) + plain[offset + 1 :]
    with pytest.raises(IntegrityError, match=r"not what its manifest says: global/pg_control$"):
        component.check(part, iter([flipped]))
    wal = next(name for name in names if name.startswith("pg_wal/0"))
    with pytest.raises(IntegrityError, match="lacks WAL that it needs"):
        check_base([without(plain, wal)], part.holds)
    with pytest.raises(IntegrityError, match="not what its manifest says: PG_VERSION"):
        check_base([without(plain, "PG_VERSION")], part.holds)

    with server.connect() as connection:
        connection.execute("SET allow_in_place_tablespaces = on")
        connection.execute("CREATE TABLESPACE elsewhere LOCATION ''")
    with pytest.raises(Permanent, match="tablespaces elsewhere"):
        component.sources({"base": "full"})


def without(plain: bytes, name: str) -> bytes:
    """Return the tar archive without one of its members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(plain)) as source, tarfile.open(fileobj=out, mode="w") as target:
        for member in source:
            if member.name != name:
                target.addfile(member, source.extractfile(member) if member.isfile() else None)
    return out.getvalue()
