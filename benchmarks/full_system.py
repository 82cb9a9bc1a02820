"""A full backup and restore of the demo system: the runbook's programs one after another against this system, in turn, in one run.

python -m benchmarks.full_system [MEGABYTES [ROUNDS]]

The runbook's side is what its scripts would do if they worked: the same programs and options in the same order, with waits that end
as soon as what they wait for is there, and without its fixed sleeps, its starts of containers and its health checks. This side is
``ai-micro-backup backup`` and ``restore`` as typed, with everything: verification of each part, comparison with the record,
services stopped and asked for their health. After every restore both must give the same rows, keys and files as before.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psycopg
import redis

from compose.demo import settings
from compose.demo.cluster import Cluster
from compose.demo.embedded import RedisServer, free_port, postgres_bin_dir
from compose.demo.embedded_daemon import wait_until
from compose.demo.embedded_system import EmbeddedSystem
from compose.demo.fingerprint import diff
from compose.demo.seed import drop_all

BOUND = 3600
"""Seconds after which one backup or restore hangs."""


class Runbook:
    """The scripts of the runbook, for the demo system's processes."""

    def __init__(self, system: EmbeddedSystem, folder: Path) -> None:
        self._system, self._folder = system, folder
        self._environment = os.environ | {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(system.postgres.port),
            "PGUSER": "postgres",
            "PGPASSWORD": system.passwords.postgres_password,
            "PATH": f"{postgres_bin_dir()}:{os.environ['PATH']}",
        }

    def backup(self) -> int:
        """Do backup-full-system.sh and return the size of its archive in bytes."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir()
        self._sh("pg_dumpall > all_databases.sql && gzip all_databases.sql")
        self._save_redis()
        self._sh(
            f"cp {self._rdb} redis.rdb && gzip redis.rdb",
            f"mkdir files && cp -a {self._system.uploads} files/uploads && cp -a {self._system.keys} files/keys",
            "tar -czf files_backup.tar.gz files && rm -r files",
            f"tar -czf config.tar.gz -C {self._system.config_root} {' '.join(settings.CONFIG_FILES)}",
            "tar -czf full.tar.gz all_databases.sql.gz redis.rdb.gz files_backup.tar.gz config.tar.gz",
        )
        return (self._folder / "full.tar.gz").stat().st_size

    def restore(self) -> None:
        """Do restore-full-system.sh, with the databases dropped first: it would double their rows otherwise."""
        self._sh("mkdir restore && tar -xzf full.tar.gz -C restore")
        with psycopg.connect(self._system.admin_dsn, autocommit=True) as connection:
            drop_all(connection)
        self._sh(
            "gunzip -c restore/all_databases.sql.gz > all.sql && psql -q -d postgres -f all.sql >psql.log 2>&1"
        )
        self._system.redis.stop()
        self._sh(f"gunzip -c restore/redis.rdb.gz > dump.rdb && cp dump.rdb {self._rdb}")
        self._system.redis.start()
        system = self._system
        self._sh(
            "tar -xzf restore/files_backup.tar.gz",
            f"rm -rf {system.uploads} {system.keys}",
            f"cp -a files/uploads {system.uploads} && cp -a files/keys {system.keys}",
            f"tar -xzf restore/config.tar.gz -C {system.config_root}",
        )
        for name in ("authdb", "apidb", "admindb"):
            self._sh(f"psql -q -d {name} -c ANALYZE")

    @property
    def _rdb(self) -> Path:
        return self._system.redis.data_dir / "dump.rdb"

    def _save_redis(self) -> None:
        with redis.Redis.from_url(self._system.redis_url) as client:
            client.bgsave()
            if not wait_until(
                lambda: not client.info("persistence")["rdb_bgsave_in_progress"], timeout=BOUND
            ):
                raise TimeoutError("BGSAVE does not end")

    def _sh(self, *commands: str) -> None:
        for command in commands:
            subprocess.run(
                command, shell=True, check=True, cwd=self._folder, env=self._environment, timeout=BOUND
            )


class Ours:
    """This system, through its command line and real workers."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._archive = ""

    def backup(self) -> int:
        """Make a full backup and return the size of its archive in bytes."""
        run = self._run("backup")
        self._archive = Path(run["archive"]).name
        return (self._cluster.folder / "store" / run["archive"]).stat().st_size

    def restore(self) -> None:
        """Restore that backup."""
        self._run("restore", self._archive, "--confirm", settings.SYSTEM_NAME)

    def _run(self, *words: str) -> dict[str, str]:
        done = self._cluster.run("ai-micro-backup", *words, "--json", timeout=BOUND)
        if done.returncode:
            raise RuntimeError(f"{words[0]} failed: {done.stdout}{done.stderr}")
        document: dict[str, str] = json.loads(done.stdout)
        return document


def timed(work: Callable[[], object]) -> tuple[float, object]:
    """Return the seconds that a work took and what it returned."""
    started = time.perf_counter()
    result = work()
    return time.perf_counter() - started, result


def main(megabytes: float, rounds: int) -> None:
    """Print for each contender the seconds of each round, their median, and the size of its archive."""
    folder = Path(tempfile.mkdtemp(prefix="benchmark-", dir="/var/tmp"))
    folder.chmod(0o755)
    system = EmbeddedSystem(folder / "system")
    password = secrets.token_urlsafe(24)
    broker = RedisServer(folder / "broker", free_port(), password, appendonly=True)
    environment = {
        settings.BROKER_PASSWORD: password,
        settings.REDIS_PASSWORD: system.passwords.redis_password,
        settings.POSTGRES_PASSWORD: system.passwords.postgres_password,
    }
    config = folder / "backup.toml"
    try:
        system.up()
        config.write_text(
            settings.settings(settings.embedded_components(system), folder=folder, broker_port=broker.port)
        )
        held = system.seed(megabytes)
        system.wait_healthy()
        print(f"{megabytes:g} MB, {os.cpu_count()} cores: {json.dumps(held)}", flush=True)
        before = system.fingerprint()
        with Cluster(folder, config, broker=broker, environment=environment) as cluster:
            cluster.start_all("db1", "app1")
            contenders: dict[str, Runbook | Ours] = {
                "runbook": Runbook(system, folder / "runbook"),
                "ai-micro-backup": Ours(cluster),
            }
            seconds: dict[tuple[str, str], list[float]] = {}
            for number in range(rounds):
                for name, contender in contenders.items():
                    took, size = timed(contender.backup)
                    seconds.setdefault((name, "backup"), []).append(took)
                    system.destroy_data()
                    took, _ = timed(contender.restore)
                    seconds.setdefault((name, "restore"), []).append(took)
                    differences = diff(before, system.fingerprint())
                    print(
                        f"round {number + 1}, {name}: archive of {size} bytes, {len(differences)} difference(s)",
                        flush=True,
                    )
                    for line in differences[:5]:
                        print(f"  {line}")
            for (name, what), measured in seconds.items():
                shown = ", ".join(f"{value:.1f}" for value in measured)
                print(f"{what:8} {name:16} median {statistics.median(measured):6.1f} s  ({shown})")
    finally:
        system.down()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(float(sys.argv[1]) if len(sys.argv) > 1 else 200, int(sys.argv[2]) if len(sys.argv) > 2 else 3)
