"""Commands that README and the page for emergencies tell people to type are commands that exist, with these options."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

from tasks.cli import cli

ROOT = Path(__file__).parents[2]
PAGES = ("README.md", "docs/emergency.md")


def typed(page: str) -> list[str]:
    """Each command line of the page that begins with the program's name."""
    text = (ROOT / page).read_text()
    inline = re.findall(r"`(ai-micro-backup [^`]+)`", text)
    blocks = re.findall(r"^ *(ai-micro-backup [^#\n]+)", text, re.MULTILINE)
    return [re.sub(r"\[([A-Z]+)…?\]", r"\1", line) for line in (*inline, *blocks)]


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_shown_parses(page: str) -> None:
    lines = typed(page)
    assert len(lines) > 5
    commands = typer.main.get_command(cli).commands  # type: ignore[attr-defined]  # a group, as it has commands
    for line in lines:
        name, *words = shlex.split(line)[1:]
        command = commands[name]
        context = command.make_context(name, words or ["--json"])
        assert context.params, line
