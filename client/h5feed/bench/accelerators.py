"""Simulated accelerators: processes that take batches and sleep for the time of a step, as in MLPerf Storage."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import BadParameter, ConnectionFailed, FeedError
from ..feed import connect
from ..fetching.readahead import DEFAULT_READAHEAD
from .findings import Training
from .streams import PATIENCE, trained

BATCHES_AHEAD = 2
"""Batches that an accelerator fetches ahead at least: DLIO's `prefetch_size`."""

LEAST_STEPS = 6
"""Steps that a trial measures at least. With fewer, batches that were fetched ahead would hide that the others are
late. If so many do not fit into `PATIENCE` times the time, the accelerator is not fed."""

_START_SECONDS = 60.0
"""How long the accelerators may take to start, beside the deadline of their requests."""

_END_SECONDS = 30.0
"""How long they may take to end, beside that deadline."""


@dataclass(frozen=True)
class Job:
    """What all accelerators of a trial do; JSON in the environment of their processes.

    Attributes
    ----------
    url, dataset, split : str
    token : str or None
    deadline : float
        Of a request, in seconds.
    options : dict
        See `Dataset.plan`.
    batch_size : int
    step : float
        Seconds of a step.
    seconds : float
        How long to train.
    epoch : int
        The first one.
    """

    url: str
    dataset: str
    split: str
    token: str | None
    deadline: float
    options: Mapping[str, Any]
    batch_size: int
    step: float
    seconds: float
    epoch: int


@dataclass(frozen=True)
class Trial:
    """What some accelerators at a time achieved.

    Attributes
    ----------
    accelerators : int
    steps : int
        Of the accelerator with the fewest, without the first.
    utilisation : float
        Mean of all accelerators, 0 to 1.
    samples_per_second, bytes_per_second : float
        Of all accelerators together.
    """

    accelerators: int
    steps: int
    utilisation: float
    samples_per_second: float
    bytes_per_second: float


def try_accelerators(job: Job, count: int) -> Trial:
    """Let `count` accelerators train at the same time, each on its shard of the dataset.

    Raises
    ------
    FeedError
        One of them failed.
    """
    environment = {**os.environ, _JOB: json.dumps(job.__dict__)}
    command = [sys.executable, "-m", __name__, str(count)]
    with contextlib.ExitStack() as ending:
        processes = []
        for shard in range(count):
            process = subprocess.Popen(
                [*command, str(shard)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
            )
            ending.callback(_end, process)
            processes.append(process)
        # Nobody starts before all are connected: an accelerator alone would have the server for itself.
        until = time.monotonic() + _START_SECONDS + job.deadline
        for process in processes:
            _line(process, until)
        for process in processes:
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.write("go\n")
                process.stdin.flush()
        until = time.monotonic() + PATIENCE * job.seconds + 2 * job.deadline + _END_SECONDS
        results = [_line(process, until) for process in processes]
    seconds = [result["seconds"] for result in results]
    rates = [result["steps"] * job.batch_size / max(took, 1e-9) for result, took in zip(results, seconds, strict=True)]
    sizes = [result["sample_bytes"] for result in results]
    return Trial(
        count,
        min(result["steps"] for result in results),
        sum(result["utilisation"] for result in results) / count,
        sum(rates),
        sum(rate * size for rate, size in zip(rates, sizes, strict=True)),
    )


def _line(process: subprocess.Popen[str], until: float) -> dict[str, Any]:
    """The next line of a process, which is JSON.

    Raises
    ------
    FeedError
    """
    assert process.stdout is not None
    ready, _, _ = select.select([process.stdout], [], [], max(0.0, until - time.monotonic()))
    line = process.stdout.readline() if ready else ""
    try:
        told: dict[str, Any] = json.loads(line)
    except ValueError:
        state = "ended" if ready else "does not respond"
        raise ConnectionFailed(f"the process of a simulated accelerator {state}: it said {line[:200]!r}") from None
    if "error" in told:
        raise FeedError(told["error"])
    return told


def _end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


_JOB = "H5FEED_BENCH_JOB"


def _accelerate(job: Job, shard: int, shards: int) -> None:
    with connect(job.url, token=job.token, deadline=job.deadline) as feed:
        dataset = feed[job.dataset]
        plan = dataset.plan(
            job.split,
            batch_size=job.batch_size,
            shuffle=True,
            shard=shard,
            shards=shards,
            last="drop",
            **job.options,
        )
        if not plan.batches:
            raise BadParameter(
                f"{dataset.name!r} has {plan.rows} rows, but {shards} accelerators need {shards * job.batch_size} for "
                "a step"
            )
        _tell(ready=True)
        sys.stdin.readline()
        readahead = max(DEFAULT_READAHEAD, BATCHES_AHEAD * plan.batch_bytes)
        nbytes, rows = 0, 0

        def count(batch_bytes: int, batch_rows: int) -> None:
            nonlocal nbytes, rows
            nbytes, rows = nbytes + batch_bytes, rows + batch_rows

        training = trained(
            dataset.read_passes(plan, job.epoch, 0, readahead=readahead),
            job.step,
            job.batch_size,
            seconds=job.seconds,
            max_bytes=float("inf"),
            least=LEAST_STEPS,
            tick=lambda done, rate: None,
            count=count,
        ) or Training(job.step, 0, 0.0)
    _tell(
        steps=training.steps,
        # By the time that steps should take: a sleep that is too long, because this machine is busy, is no work.
        utilisation=min(1.0, training.steps * job.step / max(training.seconds, 1e-9)),
        seconds=training.seconds,
        sample_bytes=nbytes / max(rows, 1),
    )


def _tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    try:
        _accelerate(Job(**json.loads(os.environ.pop(_JOB))), int(sys.argv[2]), int(sys.argv[1]))
    except FeedError as error:
        _tell(error=str(error))
    except KeyboardInterrupt:
        # The parent reports it.
        sys.exit(130)
