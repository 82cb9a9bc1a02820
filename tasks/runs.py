"""How a run goes from phase to phase: each phase is a chord of steps, whose body looks at all results and goes on.

The catalogue says where a run is; a phase is left only once, whoever sees its end first: the chord's body, its
errback, or the watchdog.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from celery import Signature, Task, chord
from celery.exceptions import WorkerLostError

from workers import catalog
from workers.app import app
from workers.catalog import Kind, Run, State, Step
from workers.hosts import CONTROL
from workers.settings import get_settings

log = logging.getLogger(__name__)
KILL_AFTER_SECONDS = 60
"""How long a step may take to end in order after its soft time limit."""

ENDINGS = {
    "WorkerLostError": "its process died (killed, or out of memory)",
    "TimeLimitExceeded": "it did not end in order after its time limit",
    "TaskRevokedError": "somebody revoked it",
}
"""What the exceptions mean that end a task from outside."""


@dataclass(frozen=True)
class Work:
    """One step to be sent: a task by its name, where it runs, and the lease under which it does."""

    name: str
    task: str
    args: tuple[Any, ...]
    queue: str
    lease: str


class Workflow(Protocol):
    """The phases of one kind of run."""

    first: str

    def work(self, run: Run, phase: str) -> list[Work]:
        """Return the steps of a phase, which run at the same time. A phase without steps is passed through."""

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> str | None:
        """Look at the ended steps of a phase and return the next one, ``None`` at the end. May be called twice."""


WORKFLOWS: dict[Kind, Workflow] = {}


@dataclass
class OnePhase:
    """A run of one phase; what its steps return is its outcome, by their names."""

    steps: Callable[[Run], list[Work]]
    first: str = "work"

    def work(self, run: Run, phase: str) -> list[Work]:
        return self.steps(run)

    def following(self, run: Run, phase: str, steps: Sequence[Step]) -> None:
        failed = [f"{step.name}: {step.error}" for step in steps if step.error]
        results = {step.name: step.result for step in steps if step.result and not step.error}
        catalog.note(run.id, cause="; ".join(failed) or None, outcome=results)


def begin(run: Run) -> None:
    """Send a run's first phase."""
    _go_on(run, leaving="", entering=WORKFLOWS[run.kind].first)


@app.task(name="tasks.runs.collect")
def collect(run_id: str, phase: str) -> None:
    """Take in the results of a phase that has ended, and go on with the next one. A second call changes nothing."""
    run = catalog.get_run(run_id)
    if run.state is not State.RUNNING or run.phase != phase:
        return
    steps = catalog.steps_of(run_id, phase)
    for step in steps:
        if step.finished is None:
            result = app.AsyncResult(step.task_id)
            if not result.ready():
                return
            if isinstance(result.result, WorkerLostError) and step.attempt < get_settings().limits.attempts:
                log.warning("the process of %s of run %s died; it is sent again", step.name, run_id)
                resend_step(step)
                return  # the watchdog collects what is not in the chord
            end_step(step, result.result)
    following = WORKFLOWS[run.kind].following(run, phase, steps)
    _go_on(catalog.get_run(run_id), leaving=phase, entering=following)


@app.task(name="tasks.runs.collect_after_loss")
def collect_after_loss(_request: Any, _error: Any, _traceback: Any, run_id: str, phase: str) -> None:
    """Errback of a chord: it runs wherever the loss was seen, so it only passes the word on."""
    collect.delay(run_id, phase)


def end_step(step: Step, result: Any) -> None:
    """Record how a step ended: its task's record, or the exception that ended the task from outside."""
    if isinstance(result, dict):
        step.result, step.error = result, result.get("error")
    else:
        name = type(result).__name__
        step.error = f"its task was ended: {ENDINGS.get(name, name)}"
    step.finished = catalog.now()
    catalog.save_step(step)


def resend_step(step: Step) -> None:
    """Send a lost step again, under a new task id, so that a late result of the lost one cannot be taken for it."""
    step.attempt += 1
    step.task_id = _task_id(step.run_id, step.phase, step.name, step.attempt)
    step.sent = step.last_seen = catalog.now()
    catalog.save_step(step)
    _signature(step).apply_async()


def _go_on(run: Run, *, leaving: str, entering: str | None) -> None:
    workflow = WORKFLOWS[run.kind]
    while entering is not None:
        steps = [_step(run.id, entering, work) for work in workflow.work(run, entering)]
        if steps:
            if catalog.enter_phase(run.id, leaving=leaving, entering=entering, steps=steps):
                log.info("run %s: %s with %d step(s)", run.id, entering, len(steps))
                _send(run.id, entering, steps)
            return
        entering = workflow.following(run, entering, [])
    if catalog.finish_run(run.id):
        ended = catalog.get_run(run.id)
        log.info("run %s %s%s", run.id, ended.state, f": {ended.cause}" if ended.cause else "")


def _send(run_id: str, phase: str, steps: Sequence[Step]) -> None:
    body = collect.si(run_id, phase).set(queue=CONTROL, shadow=f"collect {phase} of {run_id}")
    body.on_error(collect_after_loss.s(run_id=run_id, phase=phase).set(queue=CONTROL))
    chord(map(_signature, steps))(body)


def _signature(step: Step) -> Signature:
    limit = get_settings().limits.component
    task: Task[Any, Any] = app.tasks[step.task]
    host = step.queue.removeprefix("host.")
    options: dict[str, Any] = {
        "queue": step.queue,
        "task_id": step.task_id,
        "shadow": f"{step.phase} {step.name}@{host}",
        "soft_time_limit": limit,
        "time_limit": limit + KILL_AFTER_SECONDS,
    }
    return task.si(*step.args).set(**options)


def _step(run_id: str, phase: str, work: Work) -> Step:
    sent = catalog.now()
    return Step(
        run_id=run_id,
        phase=phase,
        name=work.name,
        task=work.task,
        args=list(work.args),
        queue=work.queue,
        lease=work.lease,
        task_id=_task_id(run_id, phase, work.name, 1),
        sent=sent,
        last_seen=sent,
    )


def _task_id(run_id: str, phase: str, name: str, attempt: int) -> str:
    return f"{run_id}.{phase}.{name}.{attempt}"
