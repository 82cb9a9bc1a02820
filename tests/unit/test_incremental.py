"""Chains of incremental base backups: which parent is taken, what needs what, and that a parent never goes before its child."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from tasks import prune, recover, schedule, surveys
from tasks.archive import Archive, Metadata, RunRecord, sidecar_key
from tasks.chain import archives_of
from tasks.commands.wal import recoverable
from tasks.components.postgres_incremental import LONGEST_CHAIN, names_and_sizes, newest_parent
from tasks.rebuild import take_in
from tasks.recoverable import base_backups
from tasks.retention import Backup, decide
from tasks.surveys import read_now
from tasks.verify import compare_object
from tests.configured import configured, write_settings
from workers import catalog
from workers.catalog import Artifact, Kind, Verification
from workers.component import Part
from workers.errors import IntegrityError, ObjectNotFound, Permanent
from workers.sections import RetentionPolicy
from workers.settings import Settings, get_settings
from workers.storage import Store, open_store

START = datetime(2026, 11, 22, 3, tzinfo=UTC)
BASE = "postgres-base"


def base(day: int, *needs: str, timeline: int = 1, component: str = "db") -> Artifact:
    made = START + timedelta(days=day)
    holds = {
        "system_identifier": "7",
        "timeline": timeline,
        "start_lsn": f"0/{day + 1}000028",
        "stop_lsn": f"0/{day + 1}000120",
        "finished": made.isoformat(),
        "manifest_sha256": f"{day}",
        "with_wal": True,
        "next_xid": f"{700 + day}",
    } | ({"needs": list(needs), "parent_manifest_sha256": f"{day - 1}"} if needs else {})
    part = {"component": component, "kind": BASE, "holds": holds}
    key = f"components/{component}_backup_{made:%Y%m%d_%H%M%S}.tar.gz"
    return Artifact(
        key=key, run_id=key, job="db-base", created=made, size=1, sha256="f", details={"parts": [part]}
    )


def test_the_parent_is_the_newest_that_everything_is_there_of() -> None:
    full = base(0)
    first = base(1, full.key)
    second = base(2, full.key, first.key)
    assert newest_parent("db", BASE, []) is None
    assert newest_parent("other", BASE, [full]) is None
    found = newest_parent("db", BASE, [second, full, first])
    assert found
    assert found.needs == (full.key, first.key, second.key)
    assert found.manifest_sha256 == "2"
    without = newest_parent("db", BASE, [full, second])
    assert without
    assert without.needs == (full.key,)
    assert newest_parent("db", BASE, [first, second]) is None
    names = [f"components/{number}" for number in range(LONGEST_CHAIN)]
    longest = base(40, *names[:-1])
    others = [Artifact.model_validate({**full.model_dump(), "key": name}) for name in names]
    found = newest_parent("db", BASE, [longest, *others])
    assert found
    assert longest.key not in found.needs


def test_an_increment_without_what_it_needs_cannot_be_recovered_from() -> None:
    full = base(0)
    first = base(1, full.key)
    second = base(2, full.key, first.key)
    assert [one.archive for one in base_backups("db", [full, first, second])] == [
        full.key,
        first.key,
        second.key,
    ]
    assert [one.archive for one in base_backups("db", [full, second])] == [full.key]
    assert base_backups("db", [first, second]) == []


def test_retention_keeps_what_the_newest_increment_needs() -> None:
    rows = [base(0), first := base(1, base(0).key), base(2, base(0).key, first.key), base(3)]
    backups = [surveys.backup_of(row, None) for row in rows]

    def kept(*chosen: Backup) -> frozenset[str]:
        policy = {"p": RetentionPolicy(last=1)}
        return decide(chosen, lambda _: policy, START + timedelta(days=9), wal_days={"db": 0}).kept

    assert kept(*backups[:3]) == {row.key for row in rows[:3]}
    assert kept(*backups) == {rows[3].key}


def test_a_manifest_keeps_its_names_and_sizes_and_nothing_of_the_contents() -> None:
    files = [{"Path": "a", "Size": 1, "Last-Modified": "t", "Checksum-Algorithm": "SHA256", "Checksum": "00"}]
    whole = {"System-Identifier": 7, "Files": files, "WAL-Ranges": [], "Manifest-Checksum": "00"}
    text = names_and_sizes(json.dumps(whole).encode())
    found = json.loads(text)
    assert found["Files"] == [{"Path": "a", "Size": 1, "Last-Modified": "t"}]
    assert (found["System-Identifier"], found["WAL-Ranges"]) == (7, [])
    body = text[: text.rindex(b'"Manifest-Checksum"')]
    assert found["Manifest-Checksum"] == hashlib.sha256(body).hexdigest()


PG = """
[components.{name}]
kind = "postgres"
host = "db1"
wal_archive = "/wal"
incremental = {incremental}
"""


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    more = f'[catalog]\nurl = "sqlite:///{tmp_path}/catalog.sqlite"\n' + PG.format(
        name="db", incremental="true"
    )
    with configured(write_settings(tmp_path, more=more)) as found:
        yield found


def put(store: Store, artifact: Artifact, **changed: Any) -> None:
    """Store an archive of nothing with its record, in which some of ``holds`` is ``changed``."""
    (held,) = artifact.details["parts"]
    part = Part(
        name="part", component=held["component"], host="db1", kind=BASE, codec="zstd", size=1, sha256="f", plain_size=1,
        plain_sha256="f", started=artifact.created, finished=artifact.created, holds=held["holds"] | changed,
    )  # fmt: skip
    run = RunRecord(id=artifact.run_id, job=artifact.job, started=START, finished=START)
    metadata = Metadata(
        backup_time=artifact.created,
        system_version="1",
        components={},
        system_name="shop",
        run=run,
        parts=(part,),
    )
    record = Archive(key=artifact.key, size=1, sha256="f", metadata=metadata)
    for key, content in (
        (artifact.key, b"x"),
        (sidecar_key(artifact.key), record.model_dump_json().encode()),
    ):
        with suppress(ObjectNotFound):
            store.delete(key)
        store.put(key, [content])


def test_a_chain_is_what_the_records_say_and_another_parent_is_no_parent(settings: Settings) -> None:
    store = open_store(settings.store)
    full, first, second = chain = [base(0), base(1, base(0).key), base(2, base(0).key, base(1).key)]
    for artifact in chain:
        put(store, artifact)
    keys = [artifact.key for artifact in chain]
    assert archives_of(store, second.key) == keys
    assert archives_of(store, full.key) == keys[:1]
    take_in(store, drop_gone=False)
    assert base_backups("db", catalog.list_artifacts()) == base_backups("db", chain)
    assert [one.needs for one in base_backups("db", catalog.list_artifacts())] == [
        (),
        (*keys[:1],),
        (*keys[:2],),
    ]

    others: list[dict[str, Any]] = [{"manifest_sha256": "another"}, {"needs": []}]
    for changed in others:
        put(store, first, **changed)
        with pytest.raises(IntegrityError, match=f"{first.key} holds another base backup"):
            archives_of(store, second.key)
    put(store, first)
    put(store, full, manifest_sha256="another")
    with pytest.raises(IntegrityError, match=f"{full.key} holds another base backup"):
        compare_object(store, second.key, progress=None)
    store.delete(full.key)
    with pytest.raises(IntegrityError, match=f"cannot be restored without {full.key}, which is gone"):
        archives_of(store, second.key)


def test_what_a_damaged_archive_makes_useless_is_not_chosen(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[str] = []
    monkeypatch.setattr(recover, "restore_component", lambda key, *_, **__: chosen.append(key))
    full, child, newer = base(0), base(1, base(0).key), base(2)
    for artifact in (full, child, newer):
        catalog.add_artifact(artifact)

    def damage(key: str) -> None:
        line = Verification(
            key=key, store="store", level="checksum", ok=False, taken=START, run_id=key, details={}
        )
        catalog.add_verification(line)

    recover.recover_component.run("db", options={"to_lsn": child.details["parts"][0]["holds"]["stop_lsn"]})
    recover.recover_component.run("db", options={"latest": True})
    assert chosen == [child.key, newer.key]
    damage(newer.key)
    recover.recover_component.run("db", options={"latest": True})
    assert chosen[2:] == [child.key]
    damage(full.key)
    assert recoverable() == []
    with pytest.raises(Permanent, match=r"nothing can be recovered.*--base takes one of them all the same"):
        recover.recover_component.run("db", options={"latest": True})
    recover.recover_component.run("db", options={"latest": True}, archive=newer.key)
    assert chosen[3:] == [newer.key]


def test_increments_are_scheduled_for_the_servers_that_have_them_switched_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with configured(write_settings(tmp_path, more=PG.format(name="old", incremental="false"))) as found:
        assert "incremental" not in schedule.cron_lines(found)
    both = PG.format(name="old", incremental="false") + PG.format(name="new", incremental="true")
    started: list[tuple[list[str], Any]] = []
    monkeypatch.setattr(
        schedule, "backup_full_system", lambda names, **asked: started.append((names, asked["options"]))
    )
    with configured(write_settings(tmp_path, more=both)) as found:
        lines = schedule.cron_lines(found)
        assert (lines["base"], lines["incremental"]) == ("0 3 * * 0", "0 3 * * 1-6")
        for job in ("base", "incremental"):
            schedule.start_scheduled.run(job)
    full = [([name], {"base": "full"}) for name in ("old", "new")]
    assert started == [*full, (["new"], {"base": "incremental"})]


def test_a_parent_is_not_deleted_before_what_needs_it_nor_while_its_child_is_made(settings: Settings) -> None:
    full = base(0)
    child = base(1, full.key)
    store = open_store(get_settings().store)
    for row in (full, child):
        store.put(row.key, [b"x"])
        catalog.add_artifact(row)
    with pytest.raises(Permanent, match=f"{full.key} is needed by {child.key}; delete first what needs it"):
        prune.delete.run(full.key, confirm=full.key)
    assert store.stat(full.key).size == 1

    options: dict[str, Any] = {"base": "incremental", "parent": {"needs": [full.key]}}
    run = catalog.open_run(Kind.BACKUP, job="manual", components=["db"], options=options)
    assert run
    assert read_now("store", [full.key, child.key]) == {full.key}
    assert read_now("offsite", [full.key]) == set()
    catalog.finish_run(run.id)
    assert read_now("store", [full.key]) == set()
