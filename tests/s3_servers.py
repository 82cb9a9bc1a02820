"""Servers that speak S3, started by a test: moto's, and OpenStack Swift from Debian, a real object store."""

from __future__ import annotations

import itertools
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from compose.demo.embedded import free_port
from compose.demo.embedded_daemon import wait_until
from workers.secret import Secret
from workers.sections import S3StoreSettings

BUCKET = "backups"
PREFIXES = itertools.count()
SWIFT = "/usr/bin/swift-proxy-server"


@dataclass(frozen=True)
class S3Server:
    """A running server, and what its clients must be told."""

    endpoint: str
    folder: Path
    access_key: str
    secret_key: str
    settings: dict[str, Any]

    @cached_property
    def client(self) -> Any:
        """A client of the test's own, to see what the store's does not show."""
        client = boto3.session.Session().client(
            "s3",
            endpoint_url=self.endpoint,
            region_name="us-east-1",
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            config=Config(s3={"addressing_style": "path"}, request_checksum_calculation="when_required"),
        )
        client.create_bucket(Bucket=BUCKET)
        return client

    def store(self, **settings: Any) -> S3StoreSettings:
        """Return the settings of an empty store: a prefix of its own."""
        assert self.client
        keys = {"access_key_id": self.access_key, "secret_access_key": self.secret_key}
        for name, value in keys.items():
            (self.folder / name).write_text(value)
        return S3StoreSettings.model_validate(
            {
                "kind": "s3",
                "bucket": BUCKET,
                "prefix": f"shop/{next(PREFIXES)}",
                "endpoint": self.endpoint,
                "region": "us-east-1",
                "path_style": True,
                "attempts": 2,
                **{name: Secret(file=self.folder / name) for name in keys},
                **self.settings,
                **settings,
            }
        )

    def everything(self, settings: S3StoreSettings) -> list[str]:
        """Return all that a store holds: objects, and uploads that were neither completed nor aborted."""
        place = {"Bucket": settings.bucket, "Prefix": f"{settings.prefix}/"}
        objects = self.client.list_objects_v2(**place).get("Contents", [])
        uploads = self.client.list_multipart_uploads(**place).get("Uploads", [])
        return [item["Key"] for item in [*objects, *uploads]]

    def arrived(self, settings: S3StoreSettings) -> int:
        """Return how many bytes of such uploads there are."""
        uploads = self.client.list_multipart_uploads(Bucket=settings.bucket, Prefix=f"{settings.prefix}/")
        return sum(
            part["Size"]
            for upload in uploads.get("Uploads", [])
            for part in self.client.list_parts(
                Bucket=settings.bucket, Key=upload["Key"], UploadId=upload["UploadId"]
            ).get("Parts", [])
        )


@contextmanager
def moto_server(folder: Path) -> Iterator[S3Server]:
    """Moto's S3 server in a process of its own."""
    port = free_port()
    with _processes(folder, {"moto": [sys.executable, "-m", "moto.server", "-p", str(port)]}, [port]):
        yield S3Server(f"http://127.0.0.1:{port}", folder, "test-key", "test-secret", {})


@contextmanager
def swift_server(folder: Path) -> Iterator[S3Server]:
    """OpenStack Swift with one copy of everything on one device, and its s3api in front; the test is skipped without."""
    if not Path(SWIFT).exists():
        pytest.skip(
            "no OpenStack Swift is installed; as root on Debian, `scripts/install-test-tools` installs it"
        )
    ports = {name: free_port() for name in ("account", "container", "object", "proxy")}
    for name, text in _swift_files(folder, ports).items():
        (folder / name).write_text(text)
    subprocess.run(["/usr/bin/python3", "-c", RINGS, str(folder), *map(str, ports.values())], check=True)
    servers = {name: [f"/usr/bin/swift-{name}-server", str(folder / f"{name}.conf"), "-v"] for name in ports}
    with _processes(folder, servers, list(ports.values())):
        settings = {"checksums": "md5"}
        yield S3Server(f"http://127.0.0.1:{ports['proxy']}", folder, "test:tester", "testing", settings)


RINGS = """
import sys
from swift.common.ring import RingBuilder
for name, port in zip(("account", "container", "object"), sys.argv[2:]):
    builder = RingBuilder(2, 1, 1)
    builder.add_dev({"region": 1, "zone": 1, "ip": "127.0.0.1", "port": int(port), "device": "d1", "weight": 1})
    builder.rebalance()
    builder.get_ring().save(sys.argv[1] + "/" + name + ".ring.gz")
"""


def _swift_files(folder: Path, ports: dict[str, int]) -> dict[str, str]:
    (folder / "devices/d1").mkdir(parents=True)
    common = f"""
swift_dir = {folder}
devices = {folder}/devices
mount_check = false
bind_ip = 127.0.0.1
workers = 0
user = root
log_address = {folder}/no-syslog
fallocate_reserve = 0
"""
    files = {"swift.conf": "[swift-hash]\nswift_hash_path_suffix = test\n"}
    for name in ("account", "container", "object"):
        files[f"{name}.conf"] = f"""[DEFAULT]
{common}bind_port = {ports[name]}
[pipeline:main]
pipeline = {name}-server
[app:{name}-server]
use = egg:swift#{name}
"""
    files["proxy.conf"] = f"""[DEFAULT]
{common}bind_port = {ports["proxy"]}
[pipeline:main]
pipeline = cache s3api tempauth bulk slo proxy-server
[app:proxy-server]
use = egg:swift#proxy
account_autocreate = true
allow_account_management = true
[filter:cache]
use = egg:swift#memcache
memcache_servers = 127.0.0.1:1
[filter:s3api]
use = egg:swift#s3api
location = us-east-1
[filter:tempauth]
use = egg:swift#tempauth
user_test_tester = testing .admin
[filter:bulk]
use = egg:swift#bulk
[filter:slo]
use = egg:swift#slo
"""
    return files


@contextmanager
def _processes(folder: Path, commands: dict[str, list[str]], ports: list[int]) -> Iterator[None]:
    running = []
    try:
        for name, command in commands.items():
            with (folder / f"{name}.log").open("wb") as log:
                running.append(subprocess.Popen(command, stdout=log, stderr=log))
        for port in ports:
            ready: Callable[[], bool] = partial(_listens_or_ended, port, running)
            assert wait_until(ready, timeout=60)
            assert _listens(port), "".join(path.read_text() for path in folder.glob("*.log"))
        yield
    finally:
        for process in running:
            process.terminate()
        for process in running:
            process.wait(timeout=20)


def _listens_or_ended(port: int, processes: list[subprocess.Popen[bytes]]) -> bool:
    return _listens(port) or any(process.poll() is not None for process in processes)


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
