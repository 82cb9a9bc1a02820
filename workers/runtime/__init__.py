"""Where a component lives: in a container, or as programs and folders of this host.

A component knows only the protocols and functions of this module; which runtime it has is a setting.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Protocol

from workers.errors import CommandFailed

if TYPE_CHECKING:
    from workers.location import Location
    from workers.runtime.docker_volume import VolumeRuntime

VOLUMES = PurePosixPath("/volumes")
"""The folder that the helper containers of a named volume have it in, under its name."""
MARKER = "AI_MICRO_BACKUP_COMPONENT"
"""Environment variable that every program started for a component carries, so that `sweep` finds orphans."""


class Process(Protocol):
    """A running program. Exactly one caller reads ``output``; another thread may ``write``."""

    def write(self, chunk: bytes) -> None:
        """Send ``chunk`` to its stdin. Raises ``BrokenPipeError`` when the program no longer reads."""

    def close_input(self) -> None:
        """End its stdin."""

    def output(self) -> Iterator[bytes]:
        """Yield its stdout, then check its exit status.

        Raises ``CommandFailed``, with the end of its stderr, when the status is not 0. However the iterator ends
        (also when it is closed early), the program and its children have ended, inside the container as well.
        """

    def kill(self) -> None:
        """End it and its children at once, inside the container as well; one that has ended is no error."""


class Runtime(Protocol):
    """Runs programs and reads and writes file trees where the component lives.

    Every method raises ``RuntimeUnavailable`` when the container or its engine does not answer.
    """

    def spawn(self, argv: Sequence[str], *, env: Mapping[str, str] | None = None) -> Process:
        """Start a program with stdin and stdout piped. Secrets go in ``env`` or stdin, never in ``argv``."""

    def read_tree(
        self,
        path: PurePosixPath,
        *,
        members: Sequence[str] | None = None,
        exclude: Sequence[str] = (),
        warnings: list[str] | None = None,
    ) -> Iterator[bytes]:
        """Yield a tar stream of ``path`` (a folder or a file), its members named ``<basename>/…`` in name order.

        With ``members``, ``path`` is a folder, and only these of its entries (relative names; folders with all
        below them) are read, in the order given, and named as given, without ``<basename>/``. Every one must exist.

        Names (any bytes), modes, numeric owners, times, symbolic and hard links are kept; of a hard-linked file,
        the first name read holds the content. ``exclude`` holds shell patterns matched against each path component,
        as ``tar --exclude`` does. What changes, shrinks or vanishes while it is read does not end the stream: a line
        for each (the last ones, some kB at most) is added to ``warnings`` before the iterator ends. What is not
        there at all raises ``CommandFailed``.
        """

    def write_tree(self, folder: PurePosixPath, chunks: Iterable[bytes]) -> None:
        """Unpack a tar stream below the existing ``folder``, with owners (where permitted), modes and times."""

    def remove_leftovers(self, component: str) -> bool:
        """Remove what is left of a component beside programs, and what would hold up the end of these; see `sweep`.

        Returns whether programs of the component may still run there.
        """


class Service(Protocol):
    """A program or container that can be stopped and started."""

    def is_running(self) -> bool:
        """Say whether it runs now."""

    def stop(self) -> None:
        """Stop it and return when it has ended; one that is stopped already is no error."""

    def start(self) -> None:
        """Start it, creating its container from the compose file when there is none."""


def stream(
    runtime: Runtime, argv: Sequence[str], *, env: Mapping[str, str] | None = None, sent: bytes = b""
) -> Iterator[bytes]:
    """Yield the stdout of a program that reads ``sent``, all of it before it writes anything.

    Raises ``CommandFailed`` after the last chunk.
    """
    process = runtime.spawn(argv, env=env)
    with contextlib.suppress(BrokenPipeError):  # it has ended already; its output says how
        if sent:
            process.write(sent)
    process.close_input()
    yield from process.output()


def run(
    runtime: Runtime,
    argv: Sequence[str],
    *,
    chunks: Iterable[bytes] = (),
    env: Mapping[str, str] | None = None,
    reads_all: bool = True,
) -> bytes:
    """Run a program, feed ``chunks`` to its stdin, and return its (short) stdout.

    When ``chunks`` raises, the program is killed before it could take the end of its input for an orderly one, and
    the error goes on to the caller. Raises ``CommandFailed`` when the program fails, or ends well without having
    read its whole input although ``reads_all`` says that it must.
    """
    process = runtime.spawn(argv, env=env)
    output: list[bytes] = []
    failures: list[BaseException] = []
    abandoned = False

    def drain() -> None:
        try:
            output.extend(process.output())
        except BaseException as error:  # noqa: BLE001  raised again below, in the caller's thread
            failures.append(error)

    reader = threading.Thread(target=drain, name=f"output of {argv[0]}", daemon=True)
    reader.start()
    try:
        try:
            for chunk in chunks:
                process.write(chunk)
            process.close_input()
        except BrokenPipeError:
            abandoned = True
        reader.join()
    except BaseException:
        process.kill()
        reader.join()
        raise
    if failures:
        raise failures[0]
    if abandoned and reads_all:
        raise CommandFailed(argv[0], 0, "it ended before it had read all of its input")
    return b"".join(output)


SWEEP = r"""
read_stat() {
  { IFS= read -r line < "/proc/$1/stat"; } 2>/dev/null || return 1
  set -- ${line##*) }
  state=$1 parent=$2 group=$3 session=$4
}
carriers() {
  if printf 'a\0b' | grep -qaF b 2>/dev/null; then
    grep -lsaF -e "$1" /proc/[0-9]*/environ
  else
    for file in /proc/[0-9]*/environ; do
      { tr '\0' '\n' < "$file"; } 2>/dev/null | grep -qF -e "$1" && echo "$file"
    done
  fi
}
find_all() {
  found=" "
  for file in $(carriers "$1"); do
    pid=${file#/proc/} pid=${pid%/environ}
    read_stat "$pid" && [ "$group" != "$own" ] && found="$found$pid "
  done
  [ "$found" = " " ] && return
  grown=yes
  while [ "$grown" ]; do
    grown=
    for folder in /proc/[0-9]*; do
      pid=${folder#/proc/}
      case $found in *" $pid "*) continue ;; esac
      read_stat "$pid" && [ "$group" != "$own" ] || continue
      case "$state$found" in Z*" $parent "*) ;; Z*) continue ;; esac
      case $found in *" $parent "* | *" $group "* | *" $session "*) found="$found$pid " grown=yes ;; esac
    done
  done
}
read_stat $$ && own=$group rounds=0
while find_all "$1" && [ "$found" != " " ] && [ $rounds -lt 200 ]; do
  rounds=$((rounds + 1)) parents=" "
  for pid in $found; do
    read_stat "$pid" && { [ "$state" != Z ] || [ $rounds -lt 10 ]; } && parents="$parents$parent "
  done
  leaves=
  for pid in $found; do
    case $parents in *" $pid "*) ;; *) leaves="$leaves $pid" ;; esac
  done
  kill -s STOP $leaves 2>/dev/null
  kill -s KILL $leaves 2>/dev/null
  [ $rounds -lt 3 ] || sleep 0.05 2>/dev/null || sleep 1
done
[ "$found" = " " ]
"""
"""Kills all programs with ``$1`` in their environment, with their children, groups and sessions; 0 when none is left.

Children go first, and their parents when they have seen them end: what loses its parent falls to the container's
first process, and PostgreSQL, where it is that, takes the death of such a child for the crash of a backend and restarts
itself. So a shell script sees its program fail, and must not go on then (``&&``, ``set -e``). All are stopped before the
first is killed: in a pipeline, the second would take the first one's end for the end of its input. A zombie whose parent
is none of ours has ended; a first process that reaps nothing leaves it there. Servers write their titles over their environment; whose children they are still tells what they belong to. The
group that this shell is in carries the marker as well, and is spared. Runs in any shell; busybox's grep stops at a
zero byte.
"""


def marker(component: str, config: Path | None = None) -> str:
    """Return the value of `MARKER` for a component of this configuration; none is the beginning of another.

    ``config`` is the settings file, by default this process's. Another configuration's component of the same name, on the same host, is not ours to end.
    """
    settings = config or Path(os.environ.get("AI_MICRO_BACKUP_CONFIG", "backup.toml"))
    return f"<{component} of {settings.absolute()}>"


def sweep(runtime: Runtime, component: str) -> None:
    """End the programs that run for ``component``, this process's own and those that a worker which died left.

    Only the holder of the component's lease may call this. It ends even while a reader of such a program has stalled.
    """
    if runtime.remove_leftovers(component):
        run(runtime, ["sh", "-c", SWEEP, "sh", f"{MARKER}={marker(component)}"])


def open_runtime(location: Location, *, component: str) -> Runtime:
    """Return the runtime of a component: its container's when it names one, else this host's."""
    if location.container is not None:
        from workers.runtime.docker import DockerRuntime

        return DockerRuntime(location.container, component=component)
    from workers.runtime.process import ProcessRuntime

    return ProcessRuntime(component=component)


def open_volume(volume: str, *, image: str | None, component: str) -> VolumeRuntime:
    """Return the runtime of a component that is a named volume; ``image`` is that of its helper containers."""
    from workers.runtime.docker_volume import VolumeRuntime

    return VolumeRuntime(volume, image=image, component=component)


def open_service(location: Location) -> Service:
    """Return the service at ``location``: its container, or the configured stop and start commands."""
    if location.container is not None:
        from workers.runtime.docker_service import DockerService

        return DockerService(location)
    from workers.runtime.process import ProcessService

    return ProcessService(location)
