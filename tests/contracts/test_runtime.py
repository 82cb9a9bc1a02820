"""What every runtime promises, and what only containers add."""

from __future__ import annotations

import hashlib
import io
import os
import resource
import secrets
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import docker
import pytest

from tests.contracts.conftest import Place
from workers.errors import BackupError, CommandFailed, Permanent, RuntimeUnavailable
from workers.location import Location
from workers.runtime import marker, run, stream, sweep
from workers.runtime.docker import DockerRuntime
from workers.runtime.docker_service import DockerService

MEGABYTE = 1 << 20


def soon(check: Callable[[], bool], seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not check():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def tag() -> str:
    """A number of seconds to sleep that no other test uses, to find the program by."""
    return str(200_000_000 + secrets.randbelow(100_000_000))


@pytest.mark.parametrize("size", [0, 1, 50 * MEGABYTE])
def test_bytes_in_are_bytes_out(place: Place, size: int) -> None:
    data = secrets.token_bytes(size)
    pieces = (data[start : start + 100_000] for start in range(0, size, 100_000))
    assert run(place.runtime, ["cat"], chunks=pieces) == data


def test_output_arrives_while_the_program_still_reads(place: Place) -> None:
    process = place.runtime.spawn(["sh", "-c", 'while read -r line; do echo "got $line"; done'])
    output = process.output()
    for word in (b"one", b"two"):
        process.write(word + b"\n")
        assert next(output) == b"got " + word + b"\n"
    process.close_input()
    assert list(output) == []


def test_much_on_both_outputs_blocks_nothing(place: Place) -> None:
    script = "i=0; while [ $i -lt 3000 ]; do printf %01000d 1; printf %01000d 2 >&2; i=$((i+1)); done"
    assert len(b"".join(stream(place.runtime, ["sh", "-c", script]))) == 3_000_000


def test_slow_reader_gets_all(place: Place) -> None:
    # Alone, Docker drops what is in its pipes 2 s after the program ended: at these sizes, some of the time.
    def lost(size: int) -> int:
        process = place.runtime.spawn(["head", "-c", str(size), "/dev/zero"])
        process.close_input()
        time.sleep(4)
        return size - sum(map(len, process.output()))

    sizes = range(1_100_000, 1_500_000, 25_000)
    with ThreadPoolExecutor(len(sizes)) as pool:
        assert set(pool.map(lost, sizes)) == {0}


def test_failure_tells_status_and_end_of_stderr(place: Place) -> None:
    script = "echo out; for i in 1 2 3 4 5 6 7 8 9; do printf %01000d 0 >&2; done; echo sorry >&2; exit 7"
    output = stream(place.runtime, ["sh", "-c", script])
    assert next(output) == b"out\n"
    with pytest.raises(CommandFailed) as caught:
        list(output)
    assert caught.value.status == 7
    assert "sorry" in caught.value.stderr
    assert len(caught.value.stderr) < 4500


def test_program_that_does_not_exist(place: Place) -> None:
    with pytest.raises(BackupError, match="no-such-program"):
        run(place.runtime, ["no-such-program"])


def test_failing_source_kills_the_program_before_it_takes_its_input_for_complete(place: Place) -> None:
    seconds, done = tag(), place.folder / "done"

    def source() -> Iterator[bytes]:
        yield b"x" * MEGABYTE
        raise ZeroDivisionError

    script = f"sleep {seconds} & cat >/dev/null && echo > {done}"
    with pytest.raises(ZeroDivisionError):
        run(place.runtime, ["sh", "-c", script], chunks=source())
    assert place.running(seconds) == []
    assert run(place.runtime, ["ls", str(place.folder)]) == b""


def test_early_close_leaves_nothing(place: Place) -> None:
    seconds = tag()
    script = f"sleep {seconds} & setsid sleep {seconds} & cat /dev/zero"
    output = stream(place.runtime, ["sh", "-c", script])
    next(output)
    assert len(place.running(seconds)) >= 1 or place.container is not None
    output.close()  # type: ignore[attr-defined]
    assert soon(lambda: place.running(seconds) == [], 2 if place.container else 10) or _escaped(
        place, seconds
    )


def _escaped(place: Place, seconds: str) -> bool:
    """A child in a session of its own outlives the kill on this host, not the sweep."""
    if place.container is None:
        sweep(place.runtime, place.component)
    return soon(lambda: place.running(seconds) == [], 2)


def test_orderly_end_leaves_nothing(place: Place) -> None:
    seconds = tag()
    assert run(place.runtime, ["sh", "-c", f"sleep {seconds} >/dev/null 2>&1 & echo ok"]) == b"ok\n"
    assert soon(lambda: place.running(seconds) == [], 1)


def test_kill_while_another_thread_reads(place: Place) -> None:
    seconds = tag()
    process = place.runtime.spawn(["sh", "-c", f"echo started; sleep {seconds} & env -i sleep {seconds}"])
    output = process.output()
    assert next(output) == b"started\n"
    assert (
        place.container is None
        or place.container.status != "running"
        or soon(lambda: len(place.running(seconds)) >= 2)
    )
    threading.Timer(0.3, process.kill).start()
    with pytest.raises((CommandFailed, RuntimeUnavailable)):
        list(output)
    assert soon(lambda: place.running(seconds) == [], 2)
    process.kill()


def test_kill_right_after_the_start(place: Place) -> None:
    seconds = tag()
    place.runtime.spawn(["sleep", seconds]).kill()
    time.sleep(0.5)
    assert place.running(seconds) == []


def test_program_that_ends_early_breaks_the_pipe(place: Place) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            yield bytes(MEGABYTE)

    with pytest.raises(CommandFailed, match="before it had read all"):
        run(place.runtime, ["head", "-c", "10"], chunks=endless())
    assert run(place.runtime, ["head", "-c", "3"], chunks=endless(), reads_all=False) == b"\0\0\0"


def test_secret_is_in_no_command_line(place: Place) -> None:
    secret = secrets.token_hex(16)
    process = place.runtime.spawn(["sh", "-c", 'echo "$SECRET"; cat; true'], env={"SECRET": secret})
    output = process.output()
    assert next(output).decode().strip() == secret
    command_lines = b"".join(_command_lines())
    shown = repr([docker.from_env().api.inspect_container(place.component)]) if place.container else ""
    execs = [docker.from_env().api.exec_inspect(process._exec)] if place.container else []  # type: ignore[attr-defined]
    process.close_input()
    list(output)
    assert secret not in command_lines.decode(errors="replace")
    assert secret not in shown + repr(execs)


def _command_lines() -> Iterator[bytes]:
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_bytes()
        except OSError:
            continue


def archive(depth: str = "tree") -> bytes:
    buffer = io.BytesIO()
    content = secrets.token_bytes(3000)
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT, errors="surrogateescape") as tar:

        def add(
            name: str, kind: bytes = tarfile.REGTYPE, mode: int = 0o644, link: str = "", data: bytes = b""
        ) -> None:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.linkname, member.size = kind, mode, link, len(data)
            member.uid, member.gid, member.mtime = 1234, 2345, 1_700_000_000
            tar.addfile(member, io.BytesIO(data))

        add(depth, tarfile.DIRTYPE, 0o750)
        names = [
            "-dash",
            "a space",
            "new\nline",
            "quote'\"`$",
            "ünï 日本",
            "bad\udcff\udcfe",
            "b" * 200,
            "skip.tmp",
        ]
        for name in names:
            add(f"{depth}/{name}", data=content + os.fsencode(name))
        add(f"{depth}/empty folder", tarfile.DIRTYPE, 0o1777)
        add(f"{depth}/empty file", mode=0o600)
        add(f"{depth}/setuid", mode=0o4755, data=b"#!/bin/sh\n")
        add(f"{depth}/link", tarfile.SYMTYPE, 0o777, "a space")
        add(f"{depth}/link dangling", tarfile.SYMTYPE, 0o777, "no/such")
        add(f"{depth}/z hard", tarfile.LNKTYPE, link=f"{depth}/a space")
        add(f"{depth}/sub", tarfile.DIRTYPE, 0o755)
        add(f"{depth}/sub/skip.tmp", data=b"x")
        add(f"{depth}/sub/deep", data=b"deep")
    return buffer.getvalue()


Entry = tuple[bytes, int, int, int, int, str, str]


def entries(data: bytes) -> dict[str, Entry]:
    found = {}
    with tarfile.open(fileobj=io.BytesIO(data), errors="surrogateescape") as tar:
        for member in tar:
            reader = tar.extractfile(member) if member.isreg() or member.islnk() else None
            digest = hashlib.sha256(reader.read() if reader else b"").hexdigest()
            kind = tarfile.REGTYPE if member.islnk() else member.type
            mode = 0 if member.issym() else member.mode & 0o7777
            link = member.linkname if member.issym() else ""
            found[member.name] = (kind, mode, member.uid, member.gid, int(member.mtime), link, digest)
    return found


def test_tree_round_trip(place: Place) -> None:
    original = archive()
    place.runtime.write_tree(place.folder, (original[i : i + 777] for i in range(0, len(original), 777)))
    read = b"".join(place.runtime.read_tree(place.folder / "tree"))
    assert entries(read) == entries(original)
    with tarfile.open(fileobj=io.BytesIO(read)) as tar:
        assert sum(member.islnk() for member in tar) == 1
    names = list(entries(read))
    assert names[0] == "tree"
    assert [name.encode(errors="surrogateescape") for name in names if name.count("/") == 1] == sorted(
        name.encode(errors="surrogateescape") for name in names if name.count("/") == 1
    )


def test_tree_without_what_is_excluded(place: Place) -> None:
    original = archive()
    place.runtime.write_tree(place.folder, [original])
    read = entries(
        b"".join(place.runtime.read_tree(place.folder / "tree", exclude=["*.tmp", "empty folder"]))
    )
    kept = {
        name: entry
        for name, entry in entries(original).items()
        if not name.endswith((".tmp", "empty folder"))
    }
    assert read == kept


def test_members_of_a_folder(place: Place) -> None:
    original = archive()
    place.runtime.write_tree(place.folder, [original])
    chosen = ["tree/sub", "tree/-dash"]
    read = entries(b"".join(place.runtime.read_tree(place.folder, members=chosen)))
    wanted = entries(original)
    assert list(read)[-1] == "tree/-dash"
    assert read == {name: wanted[name] for name in read}
    assert set(read) == {"tree/sub", "tree/sub/deep", "tree/sub/skip.tmp", "tree/-dash"}
    assert entries(b"".join(place.runtime.read_tree(place.folder, members=[]))) == {}


def test_path_that_does_not_exist(place: Place) -> None:
    with pytest.raises(CommandFailed, match="missing"):
        list(place.runtime.read_tree(place.folder / "missing"))
    with pytest.raises(Permanent, match="missing"):
        place.runtime.write_tree(place.folder / "missing", [archive()])


def test_source_that_fails_in_the_middle_of_a_tree(place: Place) -> None:
    def source() -> Iterator[bytes]:
        yield archive()[:2048]
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        place.runtime.write_tree(place.folder, source())
    with pytest.raises(BackupError):
        place.runtime.write_tree(place.folder, [archive()[:9000]])


def test_tree_that_is_not_read_to_its_end(place: Place) -> None:
    run(place.runtime, ["sh", "-c", f"head -c 80000000 /dev/zero > {place.folder}/big"])
    output = place.runtime.read_tree(place.folder / "big")
    next(output)
    output.close()  # type: ignore[attr-defined]
    assert soon(lambda: place.running("--create") == [], 2)
    if place.container:
        place.container.reload()


def test_memory_stays_flat(place: Place) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    size = 150 * MEGABYTE
    started = time.monotonic()
    assert sum(map(len, stream(place.runtime, ["dd", "if=/dev/zero", "bs=1048576", "count=150"]))) == size
    assert time.monotonic() - started < 15
    run(place.runtime, ["sh", "-c", "cat >/dev/null"], chunks=(bytes(MEGABYTE) for _ in range(150)))
    head = tarfile.TarInfo("big")
    head.size = size
    blocks = [head.tobuf(), *[bytes(MEGABYTE)] * 150, bytes(1024)]
    place.runtime.write_tree(place.folder, iter(blocks))
    assert sum(map(len, place.runtime.read_tree(place.folder / "big"))) > 0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 60_000  # kB


ORPHAN = """
import os, sys
from pathlib import Path
from workers.runtime.{module} import {name} as Runtime
process = Runtime({arguments}component={component!r}).spawn(["sh", "-c", {script!r}])
print(next(process.output()), flush=True)
import time; time.sleep(1000)
"""


def test_sweep_ends_what_a_killed_worker_left(place: Place) -> None:
    seconds = tag()
    # A child in a session and with an environment of its own, as a server that wrote its title over it.
    script = f"env -i setsid sleep {seconds} & sleep {seconds} & echo started; wait"
    module, name = ("docker", "DockerRuntime") if place.container else ("process", "ProcessRuntime")
    arguments = f"{place.component!r}, " if place.container else ""
    code = ORPHAN.format(
        module=module, name=name, arguments=arguments, component=place.component, script=script
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=Path.cwd()) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"b'started\\n'\n"
        worker.send_signal(signal.SIGKILL)
    if place.container is not None:
        time.sleep(0.5)
        assert place.container.status != "running" or len(place.running(seconds)) >= 2, "it ended by itself"
    bystander = place.runtime.spawn(["cat"]) if place.container is None else None
    if bystander is not None:
        bystander.kill()
    sweep(place.runtime, place.component)
    if (
        place.container is not None
    ):  # on this host, what left the session after its parent's death is out of reach
        assert soon(lambda: place.running(seconds) == [], 3)
    else:
        assert soon(lambda: len(place.running(seconds)) <= 1, 3)
        subprocess.run(
            ["sh", "-c", f"grep -la {seconds} /proc/[0-9]*/cmdline | cut -d/ -f3 | xargs -r kill"],
            check=False,
        )


def test_sweep_ends_though_readers_have_stalled(place: Place) -> None:
    """What a full store holds up must not hold up the end of a backup: neither the sweep nor, then, the reader."""
    readers = [
        place.runtime.spawn(["sh", "-c", "echo started; exec cat /dev/zero"]).output() for _ in range(2)
    ]
    writer = place.runtime.spawn(["cat"])
    assert all(next(reader).startswith(b"started\n") for reader in readers)
    sweeper = threading.Thread(target=sweep, args=(place.runtime, place.component), daemon=True)
    sweeper.start()
    sweeper.join(30)
    assert not sweeper.is_alive()
    for reader in readers:
        with pytest.raises((CommandFailed, RuntimeUnavailable)):
            list(reader)
    with pytest.raises(BrokenPipeError):
        writer.write(bytes(100 * MEGABYTE))
    writer.kill()
    assert run(place.runtime, ["echo", "next"]) == b"next\n"


def test_sweep_spares_other_components(place: Place) -> None:
    seconds = tag()
    process = place.runtime.spawn(["sh", "-c", f"echo started; sleep {seconds}"])
    output = process.output()
    assert next(output) == b"started\n"
    sweep(place.runtime, f"{place.component}-other")
    sweep(place.runtime, place.component[:-1])
    process.write(b"x")  # it lives
    assert place.container is None or place.container.status != "running" or len(place.running(seconds)) >= 1
    process.kill()


@pytest.fixture
def stopped(request: pytest.FixtureRequest, place: Place) -> Place:
    return place


@pytest.mark.docker
@pytest.mark.parametrize("place", ["stopped"], indirect=True)
class TestStoppedContainer:
    def test_programs_see_its_volumes_and_write_nowhere_else(self, place: Place) -> None:
        run(place.runtime, ["sh", "-c", "echo kept > /data/file"])
        assert run(place.runtime, ["cat", "/data/file"]) == b"kept\n"
        with pytest.raises(CommandFailed, match=r"Read-only(.|\n)*is stopped.*/data"):
            run(place.runtime, ["touch", "/etc/lost"])

    def test_trees_reach_every_path(self, place: Place) -> None:
        original = archive()
        place.runtime.write_tree(PurePosixPath("/srv"), [original])
        assert entries(b"".join(place.runtime.read_tree(PurePosixPath("/srv/tree")))) == entries(original)

    def test_helpers_that_are_left_are_removed_and_not_those_of_another_configuration(
        self, place: Place, docker_client: docker.DockerClient, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert isinstance(place.runtime, DockerRuntime)
        label = f"ai-micro-backup.component={marker(place.component)}"
        found: dict[str, str | list[str] | bool] = {"label": label}
        abandoned = place.runtime.spawn(["sleep", "1000"])
        assert len(docker_client.containers.list(filters=found)) == 1
        with monkeypatch.context() as patch:
            patch.setenv("AI_MICRO_BACKUP_CONFIG", "/etc/another.toml")
            sweep(place.runtime, place.component)
        assert len(docker_client.containers.list(filters=found)) == 1
        sweep(place.runtime, place.component)
        assert docker_client.containers.list(all=True, filters=found) == []
        abandoned.kill()


@pytest.mark.docker
@pytest.mark.parametrize("place", ["docker"], indirect=True)
class TestContainer:
    def test_container_that_stops_in_the_middle(self, place: Place) -> None:
        assert place.container is not None
        output = stream(place.runtime, ["sh", "-c", "echo first; sleep 1000"])
        assert next(output) == b"first\n"
        place.container.kill()
        with pytest.raises(RuntimeUnavailable, match=place.component):
            list(output)

    def test_container_that_is_paused(self, place: Place) -> None:
        assert place.container is not None
        place.container.pause()
        with pytest.raises(RuntimeUnavailable, match="paused"):
            run(place.runtime, ["true"])
        place.container.unpause()

    def test_service_stops_and_starts(self, place: Place) -> None:
        service = DockerService(Location(container=place.component, stop_timeout=5))
        assert service.is_running()
        service.stop()
        service.stop()
        assert (service.exists(), service.is_running()) == (True, False)
        service.start()
        assert service.is_running()


@pytest.mark.docker
def test_container_that_is_missing(docker_client: docker.DockerClient) -> None:
    with pytest.raises(RuntimeUnavailable, match="no container nobody-s-name; start its service"):
        run(DockerRuntime("nobody-s-name", component="x"), ["true"])


@pytest.mark.docker
def test_engine_that_does_not_answer(tmp_path: Path) -> None:
    code = "from workers.runtime.engine import inspect; inspect('some-name')"
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/none.sock"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert "RuntimeUnavailable: the Docker engine does not answer for some-name" in done.stderr


@pytest.mark.docker
def test_service_is_created_from_its_compose_file(docker_client: docker.DockerClient, tmp_path: Path) -> None:
    name = f"contract-{secrets.token_hex(4)}"
    file = tmp_path / "compose.yml"
    service = DockerService(
        Location(container=name, compose_file=file, compose_service="one", stop_timeout=20)
    )
    assert not service.exists()
    service.stop()
    with pytest.raises(Permanent, match="does not exist"):
        service.start()
    health = '{test: ["CMD", "test", "-e", "/tmp/ready"], interval: 1s, retries: 30}'
    command = '["sh", "-c", "sleep 2; touch /tmp/ready; exec sleep 1000"]'
    one = f"{{container_name: {name}, image: 'debian:trixie-slim', command: {command}, network_mode: none, healthcheck: {health}}}"
    file.write_text(
        f"name: {name}\nservices: {{one: {one}, two: {{image: nobody/none, network_mode: none}}}}\n"
    )
    try:
        service.start()
        assert docker_client.containers.get(name).attrs["State"]["Health"]["Status"] == "healthy"
    finally:
        docker_client.containers.get(name).remove(force=True)


@pytest.mark.docker
def test_service_that_ends_at_once_says_why(docker_client: docker.DockerClient) -> None:
    name = f"contract-{secrets.token_hex(4)}"
    container = docker_client.containers.create(
        "debian:trixie-slim", ["sh", "-c", "echo the reason; exit 3"], name=name, network_mode="none"
    )
    try:
        with pytest.raises(RuntimeUnavailable, match=r"did not start(.|\n)*exit code 3(.|\n)*the reason"):
            DockerService(Location(container=name, stop_timeout=10)).start()
    finally:
        container.remove(force=True)


@pytest.mark.docker
def test_image_without_a_shell(docker_client: docker.DockerClient, busybox_image: str) -> None:
    container = docker_client.containers.run(
        busybox_image, ["/bin/busybox", "sleep", "1000"], detach=True, network_mode="none"
    )
    try:
        container.exec_run(["/bin/busybox", "rm", "/bin/sh"])
        assert container.name is not None
        with pytest.raises(CommandFailed, match="needs a shell"):
            run(DockerRuntime(container.name, component="x"), ["true"])
    finally:
        container.remove(force=True)
