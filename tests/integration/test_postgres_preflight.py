"""What preflight says to change is all that it takes: done word for word, nothing is left to change, and WAL is archived."""

import os
import subprocess
from pathlib import Path

import pytest

from tasks.components.postgres import Component
from tests.postgres_servers import postgres_server
from tests.systems import wait_until

UNREADY = {"wal_level": "minimal", "max_wal_senders": "0", "archive_mode": "off"}
SLOT = "receiver"


@pytest.mark.parametrize("major", [15, 18])
def test_changes_that_it_names_are_all_that_it_takes(major: int, tmp_path: Path) -> None:
    with postgres_server(major, tmp_path, settings=UNREADY) as server:
        folder = tmp_path / "a folder" / "wal"
        folder.parent.mkdir()
        tmp_path.chmod(0o755)
        component = Component.model_validate({**server.settings(), "wal_archive": str(folder)})
        found = component.preflight()
        expected = ["max_wal_senders", "wal_level", "archive_mode", "archive_command", "there is no folder"]
        assert [
            finding.what
            for finding in found
            if not finding.advice and finding.what.startswith(tuple(expected))
        ] == [finding.what for finding in found if not finding.advice]
        assert len([finding for finding in found if not finding.advice]) == len(expected)
        assert [finding.what for finding in found if finding.advice] == []

        for finding in found:
            if finding.change.startswith("ALTER SYSTEM"):
                server.execute(finding.change)
            else:
                subprocess.run(["sh", "-c", finding.change], check=True)
        # What the harness sets on its own stands behind ALTER SYSTEM.
        server.restart()
        server.execute("CREATE TABLE notes (t text)")
        name = server.rows("SELECT pg_walfile_name(pg_current_wal_insert_lsn()), pg_switch_wal()")[0][0]
        assert wait_until((folder / name).exists, timeout=60), server.log()[-2000:]
        assert component.preflight() == []

        os.chown(folder, 0, 0)
        assert "may not write to" in component.preflight()[0].what
        subprocess.run(["sh", "-c", component.preflight()[0].change], check=True)
        server.rows(f"SELECT pg_create_physical_replication_slot('{SLOT}', true)")
        with_slot = component.model_copy(update={"wal_slot": SLOT})
        slow, idle = with_slot.preflight()
        assert "fills the server's disk" in slow.what
        assert f"nobody receives WAL from the replication slot {SLOT}" in idle.what
        server.execute(slow.change.partition(";")[0])
        server.execute("SELECT pg_reload_conf()")
        assert wait_until(lambda: component.preflight() == [], timeout=30)
        server.execute(f"SELECT pg_drop_replication_slot('{SLOT}')")
        missing = with_slot.preflight()
        assert "there is no replication slot" in missing[0].what


def test_component_without_wal_is_advised_to_collect_it(tmp_path: Path) -> None:
    with postgres_server(18, tmp_path) as server:
        component = Component.model_validate(server.settings())
        assert all(finding.advice for finding in component.preflight())
        assert "WAL is not collected" in component.preflight()[-1].what
