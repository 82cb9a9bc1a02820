"""The catalogue on SQLite and on a real PostgreSQL, with many processes at once."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sqlite3
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy.exc import IntegrityError as ForeignKeyViolation
from sqlmodel import SQLModel

from tests.configured import write_settings
from tests.conftest import Served
from workers import catalog
from workers.catalog import Artifact, Kind, Run, State, Step, database
from workers.errors import CatalogError
from workers.settings import CONFIG_VARIABLE, get_settings

PROCESSES = 8
DUE = datetime(2026, 11, 22, 2, 0, tzinfo=UTC)
TYPES = "CREATE TYPE kind AS ENUM ('BACKUP', 'RESTORE', 'PLAN');\nCREATE TYPE state AS ENUM ('RUNNING', 'COMPLETE', 'FAILED');"
WITHOUT_VERSION = """
CREATE TABLE run (id VARCHAR NOT NULL, kind {kind} NOT NULL, job VARCHAR NOT NULL, scheduled_at {moment},
    components JSON NOT NULL, archive VARCHAR, state {state} NOT NULL, phase VARCHAR NOT NULL, started {moment} NOT NULL,
    finished {moment}, cause VARCHAR, outcome JSON NOT NULL, PRIMARY KEY (id), UNIQUE (job, scheduled_at));
CREATE TABLE artifact ("key" VARCHAR NOT NULL, run_id VARCHAR NOT NULL, job VARCHAR NOT NULL, created {moment} NOT NULL,
    size BIGINT NOT NULL, sha256 VARCHAR NOT NULL, details JSON NOT NULL, PRIMARY KEY ("key"));
CREATE INDEX ix_artifact_run_id ON artifact (run_id);
CREATE TABLE step (run_id VARCHAR NOT NULL, phase VARCHAR NOT NULL, name VARCHAR NOT NULL, task VARCHAR NOT NULL,
    args JSON NOT NULL, queue VARCHAR NOT NULL, lease VARCHAR NOT NULL, task_id VARCHAR NOT NULL, attempt INTEGER NOT NULL,
    sent {moment} NOT NULL, last_seen {moment} NOT NULL, finished {moment}, error VARCHAR, result JSON,
    PRIMARY KEY (run_id, phase, name), FOREIGN KEY(run_id) REFERENCES run (id));
CREATE INDEX ix_step_task_id ON step (task_id);
INSERT INTO run VALUES ('20261122_020000', 'BACKUP', 'full_system', '2026-11-22 02:00:00.000000{zone}', '["keys"]',
    'full_system/a.tar.gz', 'COMPLETE', 'archive', '2026-11-22 02:00:01.000000{zone}', '2026-11-22 02:01:00.000000{zone}', NULL, '{{}}');
INSERT INTO run VALUES ('20261122_030000', 'RESTORE', 'manual', NULL, '["keys"]', 'full_system/a.tar.gz', 'RUNNING',
    'stage', '2026-11-22 03:00:00.000000{zone}', NULL, NULL, '{{"missing": []}}');
INSERT INTO step VALUES ('20261122_020000', 'backup', 'keys', 'tasks.backup.backup_component', '["20261122_020000", "keys"]',
    'host.app1', 'keys', 'a.1', 1, '2026-11-22 02:00:01.000000{zone}', '2026-11-22 02:00:01.000000{zone}', NULL, NULL, '{{"ok": true}}');
INSERT INTO artifact VALUES ('full_system/a.tar.gz', '20261122_020000', 'full_system', '2026-11-22 02:00:01.000000{zone}', 7,
    'f00', '{{"parts": []}}');
"""
"""What the version before schemas had versions made on an empty database, with a row of each kind."""


@pytest.fixture(params=["sqlite", "postgresql"])
def config(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """Settings with a new, empty catalogue; this process uses them."""
    if request.param == "sqlite":
        table = f'[catalog]\nurl = "sqlite:///{tmp_path / "catalog.sqlite"}"'
        cleanup: Callable[[], object] = lambda: None  # noqa: E731
    else:
        served: Served = request.getfixturevalue("postgres_server")
        name = f"catalog_{uuid.uuid4().hex}"
        address = f"host={served.host} port={served.port} user={served.user} password={served.password}"

        def execute(statement: str) -> None:
            with psycopg.connect(f"{address} dbname=postgres", autocommit=True) as connection:
                connection.execute(statement.encode())

        execute(f"CREATE DATABASE {name}")
        secret = tmp_path / "password"
        secret.write_text(served.password)
        url = f"postgresql+psycopg://{served.user}@{served.host}:{served.port}/{name}"
        table = f'[catalog]\nurl = "{url}"\npassword = {{ file = "{secret}" }}'
        cleanup = lambda: execute(f"DROP DATABASE {name} WITH (FORCE)")  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        path = write_settings(tmp_path, more=table)
        patch.setenv(CONFIG_VARIABLE, str(path))
        get_settings.cache_clear()
        database.engine_of.cache_clear()
        try:
            yield path
        finally:
            if database.engine_of.cache_info().currsize:
                database.engine_of(get_settings().catalog, os.getpid()).dispose()
            database.engine_of.cache_clear()
            get_settings.cache_clear()
            cleanup()


@pytest.fixture(scope="module")
def crew() -> Iterator[ProcessPoolExecutor]:
    """Processes that are there already when a test wants them to begin at the same moment."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])  # imported once, not by each process
    barrier = context.Barrier(PROCESSES)
    with ProcessPoolExecutor(PROCESSES, mp_context=context, initializer=_enlist, initargs=(barrier,)) as pool:
        yield pool


_barrier: Any = None


def _enlist(barrier: Any) -> None:
    global _barrier  # noqa: PLW0603 - a process of the crew keeps it
    _barrier = barrier


def _at_once(config: Path, work: Callable[[int], Any], number: int) -> Any:
    os.environ[CONFIG_VARIABLE] = str(config)
    get_settings.cache_clear()
    _barrier.wait(timeout=60)
    try:
        return work(number)
    finally:
        database.engine_of(get_settings().catalog, os.getpid()).dispose()
        database.engine_of.cache_clear()


def together(crew: ProcessPoolExecutor, config: Path, work: Callable[[int], Any]) -> list[Any]:
    """Call ``work`` in all processes at the same moment, and return what each returned."""
    jobs = [crew.submit(_at_once, config, work, number) for number in range(PROCESSES)]
    return [job.result(timeout=120) for job in jobs]


def open_backup(job: str = "manual", *, scheduled_at: datetime | None = None) -> Run:
    run = catalog.open_run(Kind.BACKUP, job=job, components=["keys"], scheduled_at=scheduled_at)
    assert run
    return run


def step(run: Run, name: str = "keys", phase: str = "backup") -> Step:
    return Step(
        run_id=run.id,
        phase=phase,
        name=name,
        task="tasks.backup.backup_component",
        args=[run.id, name],
        queue="host.app1",
        lease=name,
        task_id=f"{run.id}.{phase}.{name}.1",
        sent=catalog.now(),
        last_seen=catalog.now(),
    )


def _open_two(_number: int) -> list[str]:
    return [open_backup().id for _ in range(2)]


def test_runs_that_start_in_the_same_second_have_ids_of_their_own(
    config: Path, crew: ProcessPoolExecutor
) -> None:
    """It is also the catalogue's very first use, by all at once."""
    ids = [run_id for opened in together(crew, config, _open_two) for run_id in opened]

    assert len(set(ids)) == len(ids) == 2 * PROCESSES
    assert sorted(ids) == sorted(run.id for run in catalog.list_runs())
    for run_id in ids:
        named = datetime.strptime(f"{run_id}+0000", f"{catalog.RUN_ID_FORMAT}%z")
        assert abs(named - catalog.now()) < timedelta(minutes=5)


def _open_scheduled(_number: int) -> str | None:
    run = catalog.open_run(Kind.BACKUP, job="full_system", components=["keys"], scheduled_at=DUE)
    return run.id if run else None


def test_a_scheduled_run_happens_once_however_often_it_is_started(
    config: Path, crew: ProcessPoolExecutor
) -> None:
    opened = [run_id for run_id in together(crew, config, _open_scheduled) if run_id]

    assert len(opened) == 1
    assert [run.id for run in catalog.list_runs()] == opened
    # The same moment, told in another time zone, and by a later beat.
    elsewhere = DUE.astimezone(timezone(timedelta(hours=9)))
    assert (
        catalog.open_run(Kind.BACKUP, job="full_system", components=["keys"], scheduled_at=elsewhere) is None
    )
    found = catalog.find_scheduled("full_system", elsewhere)
    assert found
    assert (found.id, found.scheduled_at) == (opened[0], DUE)
    assert open_backup("keys", scheduled_at=DUE).id != opened[0], "another job is another run"
    assert open_backup("full_system", scheduled_at=DUE + timedelta(days=1)).state is State.RUNNING


def _enter(number: int) -> bool:
    (run,) = catalog.list_runs()
    return catalog.enter_phase(run.id, leaving="", entering="backup", steps=[step(run, f"by-{number}")])


def test_a_phase_is_left_once_however_many_see_its_end(config: Path, crew: ProcessPoolExecutor) -> None:
    run = open_backup()

    moved = together(crew, config, _enter)

    assert sorted(moved) == [False] * (PROCESSES - 1) + [True]
    assert catalog.get_run(run.id).phase == "backup"
    assert [found.name for found in catalog.steps_of(run.id)] == [f"by-{moved.index(True)}"]


def test_a_phase_is_entered_only_from_the_one_before_it_and_while_the_run_runs(config: Path) -> None:
    run = open_backup()

    assert not catalog.enter_phase(run.id, leaving="backup", entering="archive", steps=[step(run)])
    assert catalog.steps_of(run.id) == []
    assert catalog.finish_run(run.id)
    assert not catalog.enter_phase(run.id, leaving="", entering="backup", steps=[step(run)])


def _finish(number: int) -> bool:
    (run,) = catalog.list_runs()
    return catalog.finish_run(run.id, cause=f"cause {number}" if number % 2 else None, archive=f"a{number}")


def test_a_run_ends_once(config: Path, crew: ProcessPoolExecutor) -> None:
    run = open_backup()

    ended = together(crew, config, _finish)

    assert sorted(ended) == [False] * (PROCESSES - 1) + [True]
    winner, found = ended.index(True), catalog.get_run(run.id)
    assert (found.state, found.cause) == (
        (State.FAILED, f"cause {winner}") if winner % 2 else (State.COMPLETE, None)
    )
    assert found.archive == f"a{winner}"
    assert found.finished
    assert catalog.now() - found.finished < timedelta(minutes=1)
    assert found.started <= found.finished


def _open_restore(_number: int) -> str:
    run = catalog.open_run(Kind.RESTORE, job="manual", components=["keys"], archive="full_system/a.tar.gz")
    assert run
    return str(run.state)


def test_of_many_restores_at_once_one_runs(config: Path, crew: ProcessPoolExecutor) -> None:
    states = together(crew, config, _open_restore)

    assert sorted(states) == ["failed"] * (PROCESSES - 1) + ["running"]


def test_nothing_but_a_plan_starts_beside_a_running_restore(config: Path) -> None:
    restore = catalog.open_run(Kind.RESTORE, job="manual", components=["keys"], archive="a")
    assert restore
    for kind in (Kind.BACKUP, Kind.RESTORE):
        run = catalog.open_run(kind, job="manual", components=["keys"])
        assert run
        assert run.cause == f"the restore {restore.id} was running"
        found = catalog.get_run(run.id)
        assert (found.state, found.cause, found.finished) == (State.FAILED, run.cause, run.started)
    plan = catalog.open_run(Kind.PLAN, job="manual", components=["keys"])
    assert plan
    assert plan.state is State.RUNNING

    catalog.finish_run(restore.id)
    assert open_backup().state is State.RUNNING


def _note(number: int) -> None:
    (run,) = catalog.list_runs()
    for turn in range(3):
        catalog.note(run.id, cause=f"cause {number}", outcome={f"{number}.{turn}": number})


def test_what_many_note_is_all_kept_and_the_first_cause_stays(
    config: Path, crew: ProcessPoolExecutor
) -> None:
    run = open_backup()
    catalog.note(run.id, cause="the first", outcome={"mine": [1]})

    together(crew, config, _note)

    found = catalog.get_run(run.id)
    assert found.cause == "the first"
    assert found.outcome == {"mine": [1]} | {f"{n}.{turn}": n for n in range(PROCESSES) for turn in range(3)}
    assert catalog.finish_run(run.id)
    assert catalog.get_run(run.id).state is State.FAILED, "what has a cause is not complete"


def _everything(number: int) -> int:
    for turn in range(2):
        run = open_backup(f"job-{number}-{turn}")
        assert catalog.enter_phase(run.id, leaving="", entering="backup", steps=[step(run)])
        (mine,) = catalog.steps_of(run.id, "backup")
        mine.finished = catalog.now()
        catalog.save_step(mine)
        catalog.note(run.id, outcome={"turn": turn})
        catalog.list_runs(state=State.RUNNING)
        assert catalog.finish_run(run.id)
    return number


def test_many_work_on_it_at_once_and_none_is_refused(config: Path, crew: ProcessPoolExecutor) -> None:
    assert together(crew, config, _everything) == list(range(PROCESSES))

    runs = catalog.list_runs()
    assert len(runs) == 2 * PROCESSES
    assert {run.state for run in runs} == {State.COMPLETE}


def test_what_is_written_is_read_back_and_the_newest_is_first(config: Path) -> None:
    runs = [open_backup() for _ in range(3)]
    first = step(runs[0])
    catalog.enter_phase(runs[0].id, leaving="", entering="backup", steps=[first, step(runs[0], "settings")])
    catalog.enter_phase(
        runs[0].id, leaving="backup", entering="archive", steps=[step(runs[0], "a", "archive")]
    )
    first.error, first.result, first.attempt = "no", {"ok": False, "nested": {"é": [1, None]}}, 2
    catalog.save_step(first)

    assert [run.id for run in catalog.list_runs()] == sorted((run.id for run in runs), reverse=True)
    assert [run.id for run in catalog.list_runs(limit=1)] == [runs[-1].id]
    assert [found.name for found in catalog.steps_of(runs[0].id)] == ["keys", "settings", "a"]
    assert [found.name for found in catalog.steps_of(runs[0].id, "archive")] == ["a"]
    found = catalog.steps_of(runs[0].id, "backup")[0]
    assert (found.error, found.result, found.attempt) == (first.error, first.result, 2)
    assert found.sent == first.sent
    assert found.sent.tzinfo


def test_an_archive_recorded_twice_is_there_once(config: Path) -> None:
    def artifact(hour: int) -> Artifact:
        created = DUE + timedelta(hours=hour)
        return Artifact(
            key=f"full_system/{hour}", run_id=str(hour), job="manual", created=created, size=2**40, sha256="f" * 64,
            details={"parts": []},
        )  # fmt: skip

    for hour in (3, 20, 3, 9):
        catalog.add_artifact(artifact(hour))

    found: Sequence[Artifact] = catalog.list_artifacts()
    assert [row.key for row in found] == ["full_system/20", "full_system/9", "full_system/3"]
    assert (found[0].created, found[0].size) == (DUE + timedelta(hours=20), 2**40)


def test_an_unknown_run_is_an_error_of_ours(config: Path) -> None:
    for call in (
        catalog.get_run,
        lambda run_id: catalog.note(run_id, cause="x"),
        catalog.finish_run,
    ):
        with pytest.raises(CatalogError):
            call("20200101_000000")


def test_a_catalogue_that_does_not_answer_is_an_error_of_ours_without_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.configured import configured

    monkeypatch.setenv("TEST_CATALOG_PASSWORD", "hunter2hunter2")
    table = '[catalog]\nurl = "postgresql+psycopg://backup@127.0.0.1:1/none"\npassword = { env = "TEST_CATALOG_PASSWORD" }'
    with configured(write_settings(tmp_path, more=table)), pytest.raises(CatalogError) as raised:
        catalog.list_runs()
    assert "the catalogue failed: OperationalError" in str(raised.value)
    assert "hunter2" not in str(raised.value)


def make_old(more: str = "") -> str:
    """Return what makes a catalogue as the version before schemas had versions did."""
    if get_settings().catalog.url.startswith("sqlite"):
        return more + WITHOUT_VERSION.format(
            kind="VARCHAR(7)", state="VARCHAR(8)", moment="DATETIME", zone=""
        )
    moment = "TIMESTAMP WITH TIME ZONE"
    return more + TYPES + WITHOUT_VERSION.format(kind="kind", state="state", moment=moment, zone="+00")


def execute_old(script: str) -> None:
    """Do what ``script`` says in the database of the settings, which no worker has opened yet."""
    settings = get_settings().catalog
    if settings.url.startswith("sqlite"):
        with contextlib.closing(sqlite3.connect(settings.url.removeprefix("sqlite:///"))) as opened:
            opened.execute("PRAGMA journal_mode=WAL")
            opened.executescript(script)
    else:
        password = settings.password.resolve() if settings.password else None
        with psycopg.connect(settings.url.replace("+psycopg", ""), password=password) as connection:
            connection.execute(script.encode())


def other_default(
    _context: Any, _found: Any, column: Any, found: str | None, _said: Any, said: str | None
) -> bool:
    return not column.primary_key and (found or "").partition("::")[0].strip("'") != (said or "").strip("'")


def differences() -> list[Any]:
    """Return what Alembic would have to change for the database to be as the models say."""
    with database.engine_of(get_settings().catalog, os.getpid()).connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_server_default": other_default})
        return list(compare_metadata(context, SQLModel.metadata))


def test_migrations_make_what_the_models_say(config: Path) -> None:
    assert differences() == []


def _look(_number: int) -> list[str]:
    return [run.id for run in catalog.list_runs()]


def test_a_catalogue_without_a_version_is_upgraded_once_and_keeps_its_rows(
    config: Path, crew: ProcessPoolExecutor
) -> None:
    execute_old(make_old())

    assert together(crew, config, _look) == [["20261122_030000", "20261122_020000"]] * PROCESSES

    assert differences() == []
    running, complete = catalog.list_runs()
    assert (running.kind, running.state, running.options, running.store) == (
        Kind.RESTORE, State.RUNNING, {}, "store"
    )  # fmt: skip
    assert (complete.kind, complete.scheduled_at, complete.components) == (Kind.BACKUP, DUE, ["keys"])
    (old,) = catalog.steps_of(complete.id)
    assert (old.args, old.result, old.sent) == ([complete.id, "keys"], {"ok": True}, complete.started)
    (artifact,) = catalog.list_artifacts()
    assert (artifact.size, artifact.details) == (7, {"parts": []})
    assert catalog.finish_run(running.id, cause="lost")
    assert catalog.open_run(Kind.BACKUP, job="full_system", components=["keys"], scheduled_at=DUE) is None
    assert catalog.open_run(Kind.COLLECT, job="manual", components=["keys"])
    with pytest.raises(ForeignKeyViolation):
        delete_run(complete.id)  # which a step refers to: foreign keys are watched again


def delete_run(run_id: str) -> None:
    with catalog.session() as opened:
        opened.delete(opened.get_one(Run, run_id))


def test_a_catalogue_of_a_newer_version_is_refused_and_left_alone(config: Path) -> None:
    open_backup()
    with catalog.session() as opened:
        opened.connection().exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")
    database.engine_of(get_settings().catalog, os.getpid()).dispose()
    database.engine_of.cache_clear()

    with pytest.raises(
        CatalogError, match=r"schema 9999, which a newer version .* up to 0003: install the newer"
    ):
        catalog.list_runs()


def test_an_upgrade_that_fails_changes_nothing(config: Path) -> None:
    execute_old(
        make_old("CREATE TABLE copy (of INTEGER);")
    )  # in the way of the last table that the upgrade makes
    with pytest.raises(CatalogError, match="copy"):
        catalog.list_runs()

    execute_old("DROP TABLE copy")

    assert len(catalog.list_runs()) == 2
    assert differences() == []
