"""Ends or sends again what nobody works on, so that every run ends within a bounded time.

A message taken by a worker that dies is lost: tasks are acknowledged early, because the alternative runs long tasks
twice. What is being worked on is known by its lease, by the workers' own word, or by its message in the queue.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

from celery import Task

from tasks.runs import KILL_AFTER_SECONDS, collect, end_step, resend_step
from workers import catalog, locks
from workers.app import app
from workers.catalog import Run, State, Step, now
from workers.errors import LeaseUnavailable, RuntimeUnavailable
from workers.hosts import Census, take_census
from workers.settings import Settings, get_settings

log = logging.getLogger(__name__)


@app.task(bind=True, name="tasks.watchdog.watch", ignore_result=True)
def watch(self: Task[Any, Any]) -> None:
    """Look after every running run once. While the broker does not answer, nothing is decided."""
    settings = get_settings()
    try:
        with locks.hold(settings, "watchdog", holder=str(self.request.id)):
            waiting = locks.queue_lengths(settings)
            census = take_census(app)
            for run in catalog.list_runs(state=State.RUNNING):
                _watch_run(run, census, waiting, settings)
    except (LeaseUnavailable, RuntimeUnavailable) as error:
        log.warning("not watching now: %s", error)


def end_run(run: Run, cause: str) -> None:
    """End a running run as failed, whoever works on it: none of them can commit anything after."""
    steps: Sequence[Step] = [step for step in catalog.steps_of(run.id, run.phase) if step.finished is None]
    for step in steps:
        _fail(step, cause)
        app.control.revoke(step.task_id, terminate=True, signal="SIGQUIT")
    catalog.finish_run(run.id, cause=cause)


def _watch_run(run: Run, census: Census, waiting: dict[str, int], settings: Settings) -> None:
    if now() - run.started > timedelta(seconds=settings.limits.run):
        end_run(run, f"it took longer than {settings.limits.run:g} s (limits.run)")
        return
    steps = catalog.steps_of(run.id, run.phase)
    for step in steps:
        if step.finished is None and not app.AsyncResult(step.task_id).ready():
            _watch_step(step, census, waiting, settings)
    if all(step.finished or app.AsyncResult(step.task_id).ready() for step in steps):
        collect.delay(run.id, run.phase)


def _watch_step(step: Step, census: Census, waiting: dict[str, int], settings: Settings) -> None:
    limits = settings.limits
    host_answers = step.queue in census.queues
    if (
        locks.holder_of(settings, step.lease) == step.task_id
        or step.task_id in census.known_tasks
        or (host_answers and waiting.get(step.queue, 0) > 0)
    ):
        step.last_seen = now()
        catalog.save_step(step)
        if _age(step.sent) > _longest(settings):
            _fail(step, f"it was still not done {_age(step.sent):.0f} s after it was sent; it was ended")
            app.control.revoke(step.task_id, terminate=True, signal="SIGQUIT")
        return
    unseen = _age(step.last_seen)
    host = step.queue.removeprefix("host.")
    if host_answers and unseen > limits.lease:
        if step.attempt < limits.attempts:
            log.warning("%s of run %s was lost by %s; it is sent again", step.name, step.run_id, host)
            locks.end_holder(settings, step.task_id)
            resend_step(step)
        else:
            _fail(step, f"the worker on {host} died while it worked on it ({step.attempt} attempts)")
    elif not host_answers and unseen > (limits.run if _waits_for_its_host(step) else limits.absent_host):
        _fail(step, f"no worker on {host} has answered for {unseen:.0f} s; is it running?")
        app.control.revoke(step.task_id)


def _waits_for_its_host(step: Step) -> bool:
    """Whether a step has to be done whenever its host is back: else a restore would stay half done there."""
    return step.phase.startswith("abort-") or step.phase == "settle"


def _longest(settings: Settings) -> float:
    """Return the seconds after which a step cannot be in order any more: a full wait for its turn, and its limit."""
    return 2 * settings.limits.component + settings.limits.absent_host + KILL_AFTER_SECONDS


def _fail(step: Step, cause: str) -> None:
    log.error("%s of run %s: %s", step.name, step.run_id, cause)
    locks.end_holder(get_settings(), step.task_id)
    end_step(step, {"ok": False, "error": cause})


def _age(moment: datetime) -> float:
    return (now() - moment).total_seconds()
