"""What a PostgreSQL server and its host need so that its WAL can be archived and collected, found out without changing anything."""

from __future__ import annotations

import shlex
from typing import Any

from tasks.components.postgres_archiving import Archiver, archive_command, slot_troubles
from tasks.components.postgres_incremental import MAJOR
from tasks.components.psql import Session, literal
from workers.component import Finding
from workers.errors import CommandFailed
from workers.runtime import Runtime, run

KEEP = "10GB"
"""Room for some hours without a receiver, on most servers."""
NO_WAL = Finding(
    what="WAL is not collected: what was committed since the newest backup is lost with the server",
    change="set wal_archive in the settings of this component, and see what preflight says then",
    advice=True,
)
SERVER = """
SELECT r.rolsuper AS superuser, pg_is_in_recovery() AS standby, current_user AS role,
       current_setting('wal_level') AS wal_level, current_setting('archive_mode') AS archive_mode,
       current_setting('archive_command') AS archive_command,
       coalesce(current_setting('archive_library', true), '') AS archive_library,
       current_setting('max_wal_senders')::int AS max_wal_senders,
       current_setting('max_slot_wal_keep_size') AS max_slot_wal_keep_size,
       coalesce(current_setting('summarize_wal', true), '') AS summarize_wal,
       current_setting('data_directory') AS data_directory,
       (SELECT string_agg(slot_name, ', ') FROM pg_replication_slots WHERE NOT temporary) AS slots
FROM pg_roles r WHERE r.rolname = current_user
"""
LOOK = """
[ -d "$1" ] || { echo missing; exit; }
[ -r "$1" ] && [ -w "$1" ] && [ -x "$1" ] && echo ours
stat -c '%u %a' -- "$1" "$2"
"""
"""``missing``, or whether the worker may use the folder ``$1``, and owner and mode of it and of the data folder ``$2``."""


def preflight_server(session: Session, slot: str | None) -> list[Finding]:
    """Return what to change for base backups, and so that no replication slot can fill the server's disk."""
    row = session.rows(SERVER)[0]
    found = []
    if not row["superuser"]:
        found.append(
            Finding(
                what=f"the role {row['role']} is no superuser: it cannot read the roles' passwords or close WAL segments",
                change=f'ALTER ROLE "{row["role"]}" SUPERUSER;',
            )
        )
    if row["max_wal_senders"] == 0:
        found.append(_setting("max_wal_senders", "0, and base backups need some", "10", restart=True))
    if (slot or row["slots"]) and row["max_slot_wal_keep_size"] == "-1":
        found.append(
            _setting(
                "max_slot_wal_keep_size",
                f"-1: without a receiver, the WAL kept for the slot {row['slots'] or slot} fills the server's disk",
                KEEP,
            )
        )
    return found


def preflight_incremental(session: Session) -> list[Finding]:
    """Return what to change so that the server makes incremental base backups."""
    now = session.rows(SERVER)[0]["summarize_wal"]
    if not now:
        what = f"incremental base backups need PostgreSQL {MAJOR} or later"
        return [Finding(what=what, change="remove incremental from the settings of this component")]
    if now == "off":
        return [_setting("summarize_wal", "off, and incremental base backups need it", "on")]
    return []


def preflight_wal(session: Session, runtime: Runtime, folder: str, slot: str | None) -> list[Finding]:
    """Return what to change so that WAL gets into ``folder`` and can be collected from there."""
    row = session.rows(SERVER)[0]
    if row["standby"]:
        return [
            Finding(what="the server is a standby", change="set wal_archive on the component of its primary")
        ]
    found = []
    if row["wal_level"] == "minimal":
        found.append(_setting("wal_level", "minimal, and archiving needs more", "replica", restart=True))
    if not slot or row["archive_mode"] != "off":
        found += _archiving(row, folder)
    found += _folder(row, runtime, folder)
    if trouble := Archiver.of(session).trouble(None):
        found.append(Finding(what=trouble, advice=not Archiver.of(session).row["failing"]))
    if slot:
        found += [Finding(what=trouble) for trouble in slot_troubles(session, slot)[1]]
    return found


def _archiving(row: dict[str, Any], folder: str) -> list[Finding]:
    found, right = [], archive_command(folder)
    if row["archive_mode"] == "off":
        found.append(_setting("archive_mode", "off", "on", restart=True))
    now = row["archive_command"]
    if row["archive_library"]:
        what = f"archive_library is {row['archive_library']}; preflight cannot tell where it puts WAL"
        found.append(Finding(what=what, advice=True))
    elif row["archive_mode"] == "off" or not now:
        found.append(_setting("archive_command", "not set", right))
    elif folder not in now:
        found.append(_setting("archive_command", f"{now}, which does not name {folder}", right))
    elif now != right:
        what = "not the one that is known never to overwrite and to sync what it reports as archived; compare them"
        found.append(_setting("archive_command", what, right, advice=True))
    return found


def _folder(row: dict[str, Any], runtime: Runtime, folder: str) -> list[Finding]:
    where = shlex.quote(folder)
    try:
        lines = run(runtime, ["sh", "-c", LOOK, "sh", folder, row["data_directory"]]).decode().splitlines()
    except CommandFailed as error:
        return [Finding(what=f"{folder} cannot be looked at: {error}")]
    if lines == ["missing"]:
        owner = f"$(stat -c %u:%g {shlex.quote(row['data_directory'])})"
        change = (
            f"mkdir -p {where} && chown {owner} {where} && chmod 700 {where}   # where the server is, as root"
        )
        return [Finding(what=f"there is no folder {folder}", change=change)]
    found = []
    if lines[0] != "ours":
        what = f"the worker may not read and remove files in {folder}"
        found.append(Finding(what=what, change="run the worker as root or as the server's user"))
    (owner, mode), (server, _) = (line.split() for line in lines[-2:])
    if owner != server and not int(mode, 8) & 0o002:
        what = f"the server (user {server}) may not write to {folder}, which belongs to user {owner}"
        found.append(Finding(what=what, change=f"chown {server} {where}   # where the server is, as root"))
    return found


def _setting(name: str, now: str, value: str, *, restart: bool = False, advice: bool = False) -> Finding:
    after = "then restart the server" if restart else "then SELECT pg_reload_conf();"
    change = f"ALTER SYSTEM SET {name} = {literal(value)};   -- {after}"
    return Finding(what=f"{name} is {now}", change=change, advice=advice)
