"""Running a program as somebody other than root: PostgreSQL refuses to run as root."""

import os
import pwd
from pathlib import Path

UNPRIVILEGED = "nobody"
"""The user that root starts PostgreSQL as. It has to be in the passwd file, for initdb asks for its name."""

_CAPABILITIES = {"dac_read_search": 2, "dac_override": 1}


def unprivileged_prefix() -> list[str]:
    """Return what to put before a command: nothing, or for root the change to `nobody`.

    Checkouts and test folders often lie in a folder that only root may enter, such as root's home. So the changed-to user keeps
    one capability, to read and enter folders (`CAP_DAC_READ_SEARCH`, or `CAP_DAC_OVERRIDE` where a container has only that),
    and can gain no other.
    """
    if os.geteuid() != 0:
        return []
    user = pwd.getpwnam(UNPRIVILEGED)
    held = _permitted_capabilities()
    kept = next((f",+{name}" for name, bit in _CAPABILITIES.items() if held >> bit & 1), "")
    return [
        "setpriv",
        f"--reuid={user.pw_uid}",
        f"--regid={user.pw_gid}",
        "--clear-groups",
        "--no-new-privs",
        f"--inh-caps=-all{kept}",
        f"--ambient-caps=-all{kept}",
        "--",
    ]


def give_to_unprivileged(path: Path) -> None:
    """As root, make the unprivileged user the owner of *path* and all that is in it; otherwise do nothing."""
    if os.geteuid() != 0:
        return
    user = pwd.getpwnam(UNPRIVILEGED)
    os.chown(path, user.pw_uid, user.pw_gid, follow_symlinks=False)
    for folder, folders, files in os.walk(path):
        for name in folders + files:
            os.chown(Path(folder, name), user.pw_uid, user.pw_gid, follow_symlinks=False)


def belongs_to_unprivileged(path: Path) -> bool:
    """Whether the user that the programs run as owns *path* itself."""
    uid = os.geteuid() or pwd.getpwnam(UNPRIVILEGED).pw_uid
    return path.stat().st_uid == uid


def may_enter(path: Path) -> bool:
    """Whether the user that the programs run as may enter the folders above *path* without that capability."""
    return os.geteuid() != 0 or all(folder.stat().st_mode & 0o001 for folder in path.parents)


def _permitted_capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapPrm:"):
            return int(line.split()[1], 16)
    return 0
