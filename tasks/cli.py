"""The console script ``ai-micro-backup``: sends the same tasks, reads the same catalogue.

Exit status: 0 done, 1 the run failed (`preflight`: something has to be changed), 2 wrong settings or usage,
3 not confirmed, 4 no such archive or run, 5 the broker or a worker does not answer.
"""

from __future__ import annotations

import typer

from tasks.commands import (
    backups,
    copies,
    keeping,
    preflight,
    recoveries,
    restores,
    shows,
    verifications,
    wal,
)
from tasks.commands.common import Exit

__all__ = ["Exit", "cli", "main"]

cli = typer.Typer(
    help="Backs up, verifies and restores a system of Docker-hosted services.", no_args_is_help=True
)
cli.command()(backups.backup)
cli.command()(wal.collect)
cli.command()(copies.offsite)
cli.command()(restores.restore)
cli.command()(restores.plan)
cli.command()(recoveries.recover)
cli.command("list")(shows.list_archives)
cli.command()(shows.show)
cli.command()(keeping.prune)
cli.command()(keeping.delete)
cli.command()(keeping.rebuild)
cli.command("import")(keeping.import_archives)
cli.command()(shows.status)
cli.command()(preflight.preflight)
cli.command()(verifications.verify)


def main() -> None:
    """Run the console script."""
    cli()


if __name__ == "__main__":
    main()
