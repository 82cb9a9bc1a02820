"""Imports run one way: ``beat_schedule → tasks → workers``. Celery finds tasks, and `load` components, by name."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ALLOWED = {
    "workers": {"workers"},
    "tasks": {"tasks", "workers"},
    "beat_schedule": {"beat_schedule", "tasks", "workers"},
}
OURS = {"workers", "tasks", "beat_schedule", "compose", "tests"}


def files_of(package: str) -> list[Path]:
    if package == "beat_schedule":
        return [ROOT / "beat_schedule.py"]
    return sorted((ROOT / package).rglob("*.py"))


def imported(source: str) -> set[str]:
    """Return the first names of all modules that ``source`` imports, wherever in it it does so."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a relative import hides where it leads"
            names.add(str(node.module).partition(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_imports_run_one_way(package: str) -> None:
    files = files_of(package)
    assert files
    wrong = {
        str(path.relative_to(ROOT)): sorted(against)
        for path in files
        if (against := (imported(path.read_text()) & OURS) - ALLOWED[package])
    }
    assert wrong == {}


def test_only_the_runtime_imports_docker() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for package in ALLOWED
        for path in files_of(package)
        if "docker" in imported(path.read_text())
    }
    assert importing
    assert all(path.startswith("workers/runtime/") for path in importing), importing


def test_components_are_free_of_celery() -> None:
    importing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tasks/components").rglob("*.py")
        if imported(path.read_text()) & {"celery", "kombu"}
    }
    assert importing == set()


@pytest.mark.parametrize(
    "source",
    [
        "import tasks.runs",
        "from tasks import runs",
        "def f():\n    from tasks.runs import begin",
        "import a, tasks as t",
    ],
)
def test_an_import_is_seen_wherever_it_stands(source: str) -> None:
    assert "tasks" in imported(source)
