"""What `tune.py` does beside searching: mends its words, picks an experiment, becomes a Ray job."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import sft_ray
from sft_ray.errors import ResourceError, first_line
from sft_ray.search.cluster import capacity, capacity_here, connected, runs_here

# `ray submit` copies one file; the experiments stay with the installed checkout.
CHECKOUT = Path(sft_ray.__file__).parents[1]
ON_GPUS, ELSEWHERE = CHECKOUT / "experiments/sst2.yaml", CHECKOUT / "experiments/quickstart.yaml"
IN_A_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what a job runs
STOP_SECONDS = 600  # for running trials to write their states, before Ray kills the job
INTERRUPTED = 130


def rejoined(words: Sequence[str]) -> list[str]:
    """Words as they were before `ray submit` handed them to a shell without quotation marks.

    An override goes on until its brackets are closed, and over words that are neither options nor
    overrides: `c=[1, 2]`, which arrives as `c=[1,` and `2]`.
    """
    found = list[str]()
    for word in words:
        before = found[-1] if found else ""
        is_open = sum(before.count(c) for c in "[{") > sum(before.count(c) for c in "]}")
        if "=" in before and (is_open or not (word.startswith("--") or "=" in word)):
            found[-1] = f"{before} {word}"
        else:
            found.append(word)
    return found


def with_experiment(words: Sequence[str]) -> list[str]:
    """The words led by the experiment's file, which may be named as seen from the checkout."""
    first = words[0] if words else "="
    if "=" in first or first.startswith("--"):
        return [str(default_experiment()), *words]
    in_checkout = CHECKOUT / first
    is_there = not Path(first).exists() and in_checkout.exists()
    return [str(in_checkout) if is_there else first, *words[1:]]


def default_experiment() -> Path:
    """What to run where nothing was named: more where there are GPUs, or can be."""
    has = capacity_here(None)
    with suppress(ResourceError):  # the search will say so
        if has is None:
            with connected(None):
                has = capacity()
    return ON_GPUS if has is not None and has.get("GPU", 0) >= 1 else ELSEWHERE


def follow_as_job(script: str, words: Sequence[str]) -> int | None:
    """Run the script as a job of the Ray on this machine and show what it says, to its end.

    A job that runs the same words already is followed instead.  The first Ctrl-C stops the job,
    whose trials write their states; a second one, or the end of the connection, ends only this.

    Returns:
        The exit code of the job; None where no Ray runs, or inside a job, and nothing was done.
    """
    if IN_A_JOB in os.environ or not runs_here():
        return None
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient()
    except (ConnectionError, RuntimeError) as error:
        print(f"not run as a Ray job: {first_line(error)}", flush=True)  # noqa: T201
        return None
    command = shlex.join([sys.executable, str(Path(script).absolute()), *words])
    entrypoint = f"cd {shlex.quote(str(Path.cwd()))} && exec {command}"
    alive = (JobStatus.PENDING, JobStatus.RUNNING)
    same = [j for j in client.list_jobs() if j.entrypoint == entrypoint and j.status in alive]
    if same:
        job = str(same[0].submission_id)
    else:
        ours = {name: value for name, value in os.environ.items() if name.startswith("SFT_RAY_")}
        job = client.submit_job(
            entrypoint=entrypoint,
            submission_id=time.strftime("sft-ray-%Y%m%d-%H%M%S"),
            runtime_env={"env_vars": {**ours, "RAY_JOB_STOP_WAIT_TIME_S": str(STOP_SECONDS)}},
        )
    print(  # noqa: T201
        f"{'following' if same else 'this is'} job {job}; it goes on if this connection ends\n"
        f"  to see it again: the same command, or  ray job logs --follow {job}\n"
        f"  to stop it:      Ctrl-C, or  ray job stop {job}",
        flush=True,
    )
    try:
        asyncio.run(_follow(client, job))
    except (asyncio.CancelledError, KeyboardInterrupt):
        return INTERRUPTED
    except RuntimeError:
        print(f"lost sight of job {job}, which goes on", flush=True)  # noqa: T201
        return 1
    info = client.get_job_info(job)
    if info.status == JobStatus.STOPPED:
        return INTERRUPTED
    return 0 if info.status == JobStatus.SUCCEEDED else info.driver_exit_code or 1


async def _follow(client: Any, job: str) -> None:
    """Print the job's log until it ends; the first signal to stop is handed on to it."""
    loop, following = asyncio.get_running_loop(), asyncio.current_task()
    stopping = list[asyncio.Future[Any]]()

    def stop() -> None:
        if stopping and following is not None:
            following.cancel()
        stopping.append(loop.run_in_executor(None, client.stop_job, job))

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    async for text in client.tail_job_logs(job):
        sys.stdout.write(text)
        sys.stdout.flush()
