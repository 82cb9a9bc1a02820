"""An archive of the first format, committed as it was made, restores for ever."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tasks import archive
from tests.postgres_servers import ServePostgres
from tests.redis_servers import PASSWORD, PROGRAMS, Server
from workers.component import BaseComponent, Part, Restore, load
from workers.storage.local import LocalStore

DATA = Path(__file__).parents[1] / "data"
RUN = "20261126_161150"
KEY = f"full_backup_{RUN}.tar.gz"
STORE = LocalStore(DATA)


def brought_back(component: BaseComponent, *, was: str) -> None:
    """Check and restore what the archive has of the component that ``was`` its name then."""
    parts = [part for part in archive.read_metadata(STORE, KEY).parts if part.component == was]
    assert parts

    def read(part: Part) -> Iterator[bytes]:
        return archive.read_part(STORE, KEY, part)

    for part in parts:
        component.check(part, read(part))
    restore = Restore(RUN, parts, read)
    component.stage(restore)
    component.swap(restore)
    component.settle(restore)


def make(kind: str, **table: Any) -> BaseComponent:
    return load(kind).model_validate({"kind": kind, "name": kind, "host": "app1", **table})


def test_it_is_whole() -> None:
    metadata = archive.verify(STORE, KEY)
    assert metadata.format_version == 1
    assert metadata.components == {
        "postgresql": "4 files",
        "redis": "1 files",
        "files": "2 files",
        "config": "1 files",
    }
    assert archive.read_sidecar(STORE, KEY).metadata == metadata


def test_files_and_configuration_come_back(tmp_path: Path) -> None:
    brought_back(make("files", path=str(tmp_path / "uploads")), was="uploads")
    assert sum(path.is_file() for path in (tmp_path / "uploads").rglob("*")) > 5
    (tmp_path / "config").mkdir()
    paths = ["ai-micro-postgres/.env", "ai-micro-redis/docker-compose.yml"]
    brought_back(make("config", root=str(tmp_path / "config"), paths=paths), was="config")
    assert (tmp_path / "config/ai-micro-postgres/.env").read_text()


@pytest.mark.timeout(120)
def test_databases_come_back(serve_postgres: ServePostgres) -> None:
    server = serve_postgres(18)
    brought_back(load("postgres").model_validate({"kind": "postgres", **server.settings()}), was="postgres")
    try:
        assert server.rows("SELECT count(*) FROM users", "authdb")[0][0] > 0
    finally:
        for name in ("authdb", "apidb", "admindb"):
            server.execute(f'DROP DATABASE "{name}"')


def test_keys_come_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_REDIS_PASSWORD", PASSWORD)
    server = Server(tmp_path, next(iter(PROGRAMS.values())))
    server.start()
    try:
        brought_back(server.component(name="redis"), was="redis")
        with server.client() as client:
            assert client.dbsize() > 0
    finally:
        server.do("stop")
