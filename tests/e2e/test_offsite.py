"""A worker that is killed in the middle of an offsite copy: the next attempt goes on where it ended."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from compose.demo.embedded_daemon import wait_until
from tests.e2e.conftest import Factory
from tests.s3_servers import S3Server, moto_server
from tests.systems import System
from workers.sections import S3StoreSettings
from workers.storage import open_store
from workers.storage.s3_upload import PART

SETTINGS = """
[components.uploads]
kind = "files"
host = "app1"
path = "{uploads}"

[offsite]
bytes_per_second = {bytes_per_second}

[offsite.store]
kind = "s3"
bucket = "{store.bucket}"
prefix = "{store.prefix}"
endpoint = "{store.endpoint}"
region = "us-east-1"
path_style = true
access_key_id = {{ file = "{store.access_key_id.file}" }}
secret_access_key = {{ file = "{store.secret_access_key.file}" }}
"""
PARTS = 5

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with moto_server(tmp_path_factory.mktemp("moto")) as running:
        yield running


@pytest.fixture(scope="module")
def offsite(server: S3Server) -> S3StoreSettings:
    return server.store()


@pytest.fixture(scope="module")
def system(
    cluster_factory: Factory, offsite: S3StoreSettings, tmp_path_factory: pytest.TempPathFactory
) -> System:
    uploads: Path = tmp_path_factory.mktemp("uploads")
    (uploads / "noise").write_bytes(os.urandom(PART * PARTS - PART // 2))
    settings = SETTINGS.format(uploads=uploads, store=offsite, bytes_per_second=PART)
    return cluster_factory(settings, workers=("control", "app1"))


def test_a_worker_killed_in_mid_copy_is_gone_on_with_and_what_had_arrived_is_not_sent_again(
    system: System, server: S3Server, offsite: S3StoreSettings
) -> None:
    archive = system.complete()["archive"]
    assert wait_until(lambda: server.arrived(offsite) >= 2 * PART, timeout=60)
    system.cluster.kill("control")
    there = server.arrived(offsite) // PART
    assert there < PARTS, "it was killed too late"
    system.start_worker("control")
    copying = system.query("SELECT id FROM run WHERE kind = 'COPY'")

    run = system.ended(copying[0][0])

    assert (run["state"], len(copying)) == ("complete", 1), run
    assert system.step(run["id"], archive.rpartition("/")[2])[1] == 2
    stored = b"".join(open_store(offsite).get(archive))
    assert stored == (system.store / archive).read_bytes()
    assert server.everything(offsite) == [
        f"{offsite.prefix}/{key}" for key in (archive.replace(".tar.gz", ".metadata.json"), archive)
    ]
    log = (server.folder / "moto.log").read_text()
    sent = Counter(map(int, re.findall(r"PUT [^ ]*[?&]partNumber=(\d+)", log)))
    assert sorted(sent) == list(range(1, PARTS + 1))
    assert [sent[number] for number in range(1, there + 1)] == [1] * there
