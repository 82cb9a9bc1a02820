"""The two texts in an archive that people read: RESTORE.md and backup.log."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from workers.catalog import Run, Step
from workers.component import DECRYPT
from workers.settings import Settings

if TYPE_CHECKING:
    from tasks.archive import Metadata

FILE_NAME = "RESTORE.md"
ENCRYPTED = """The archive is encrypted,
and so is each part in it once more, since the hosts that made them hold no private key: `age` opens both."""
MEGABYTE = 1_000_000


def restore_by_hand(metadata: Metadata, settings: Settings) -> str:
    """Return RESTORE.md: how to check and restore this archive with public tools alone."""
    run = metadata.run.id
    encrypted = any(part.encryption for part in metadata.parts)
    unpack = f"{DECRYPT} <archive>.tar.gz.age | tar -xz" if encrypted else "tar -xzf <archive>.tar.gz"
    sums = "".join(f"{part.sha256}  {part.name}\n" for part in metadata.parts)
    sections = [
        f"""# Restoring {metadata.system_name} from the backup of {metadata.backup_time:%Y-%m-%d %H:%M:%S} UTC

With ai-micro-backup at hand, queue a restore instead: it checks everything first and keeps what is there. Without it,
`tar`, `zstd` and the tools of each server are enough. Replace what is in `<angle brackets>`.{" " + ENCRYPTED if encrypted else ""}

## Open and check

```sh
{unpack} && cd {run}
sha256sum --check <<'SUMS'
{sums}SUMS
```
"""
    ]
    for name in dict.fromkeys(part.component for part in metadata.parts):
        parts = [part for part in metadata.parts if part.component == name]
        sections.append(
            f"## {name} (on {parts[0].host})\n\n{settings.components[name].by_hand(parts).strip()}\n"
        )
    return "\n".join(sections)


def backup_log(run: Run, steps: Sequence[Step], metadata: Metadata) -> str:
    """Return backup.log: what was done when, a line each, times in UTC."""
    lines = [(run.started, f"run {run.id} of job {run.job} started: {', '.join(run.components)}")]
    lines += [
        (step.sent, f"{step.name}: sent again, attempt {step.attempt}") for step in steps if step.attempt > 1
    ]
    for part in metadata.parts:
        lines.append((part.started, f"{part.component} on {part.host}: {part.name} started"))
        seconds = max((part.finished - part.started).total_seconds(), 0.001)
        rate = part.plain_size / MEGABYTE / seconds
        sizes = f"{part.plain_size} bytes, {part.size} stored, in {seconds:.1f} s ({rate:.0f} MB/s)"
        lines.append(
            (
                part.finished,
                f"{part.component} on {part.host}: {part.name} done: {sizes}, sha256 {part.sha256}",
            )
        )
        lines.extend(
            (part.finished, f"{part.component} on {part.host}: warning: {text}") for text in part.remarks
        )
    for component, change in run.outcome.get("changes", {}).items():
        told = [f"{component}: changed since {change['since']}:", *change["lines"]]
        lines.extend((metadata.run.finished, line) for line in told)
    lines.append((metadata.run.finished, "all components done; archive follows"))
    return "".join(f"{time:%Y-%m-%dT%H:%M:%SZ} {text}\n" for time, text in sorted(lines, key=itemgetter(0)))
