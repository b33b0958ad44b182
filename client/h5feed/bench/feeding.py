"""``h5feed bench --workload``: how many accelerators of a workload of MLPerf Storage a server feeds."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import random
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from ..dataset import Dataset
from ..errors import BadParameter
from ..tables import text_lines
from .accelerators import LEAST_STEPS, Job, Trial, try_accelerators
from .advice import duration, size_of
from .workloads import SAMPLES, Workload

MAX_ACCELERATORS = 256
"""More are not tried on one machine."""

_SHARE = 0.25
"""Share of the time of a benchmark for each number of accelerators."""

_LIKE = 0.1
"""The mean size of a sample may differ from the workload's by this fraction."""

_TIMES_MEMORY = 5
"""MLPerf Storage wants data of this many times the memory, so that the page cache holds little of them."""

_STEPS = 500
"""Least number of steps of a result of MLPerf Storage."""


@dataclass
class Feeding:
    """The results.

    Attributes
    ----------
    samples : int
        Of the dataset.
    sample_bytes : float
        Mean size of the samples that were read.
    trials : list of Trial
        The first one has the number of accelerators that was asked for.
    is_cached : bool or None
        Whether the data fit into the server's page cache; None if its memory is not known.
    """

    workload: Workload
    url: str
    dataset: str
    samples: int
    sample_bytes: float
    server_memory: int | None
    trials: list[Trial] = field(default_factory=list)
    is_cached: bool | None = None

    def passed(self, trial: Trial) -> bool:
        return trial.steps >= LEAST_STEPS and trial.utilisation >= self.workload.utilisation

    @property
    def fed(self) -> int:
        """The largest number of accelerators that passed."""
        return max((trial.accelerators for trial in self.trials if self.passed(trial)), default=0)

    def as_json(self) -> dict[str, Any]:
        """The results as JSON-serialisable values, in seconds and bytes."""
        return {
            "url": self.url,
            "dataset": self.dataset,
            "samples": self.samples,
            "sample_bytes": round(self.sample_bytes),
            "workload": self.workload.__dict__,
            "trials": [{**trial.__dict__, "passed": self.passed(trial)} for trial in self.trials],
            "passed": self.passed(self.trials[0]),
            "accelerators_fed": self.fed,
            "from_page_cache": self.is_cached,
            "notes": _notes(self),
        }


def feed_accelerators(
    dataset: Dataset,
    workload: Workload,
    accelerators: int,
    *,
    split: str,
    options: Mapping[str, Any],
    token: str | None,
    deadline: float,
    seconds: float,
    server_memory: int | None,
    report: Callable[[str, float, float], None],
) -> Feeding:
    """Try `accelerators`, then find the largest number that passes.

    Raises
    ------
    BadParameter
        The dataset does not hold samples like the workload's, or too few.
    FeedError
    """
    if not 1 <= accelerators <= MAX_ACCELERATORS:
        raise BadParameter(f"accelerators={accelerators} must be from 1 to {MAX_ACCELERATORS}")
    if not 0 < seconds < math.inf:
        raise BadParameter(f"seconds={seconds} must be positive and finite")
    if "fields" not in options and SAMPLES in dataset.fields:
        # Rows that differ in length are sent only by name.
        options = {**options, "fields": [SAMPLES]}
    plan = dataset.plan(split, batch_size=workload.batch_size, shuffle=True, **options)
    most = min(plan.rows // workload.batch_size, MAX_ACCELERATORS)
    if accelerators > most:
        raise BadParameter(
            f"accelerators={accelerators} need {accelerators * workload.batch_size} samples for a step, but split "
            f"{split!r} of {dataset.name!r} has {plan.rows}"
        )
    sample_bytes = _sample_bytes(dataset, workload, plan.batch_bytes)
    memory = server_memory or (_own_memory() if _is_here(dataset._client.url) else None)
    found = Feeding(workload, dataset._client.url, dataset.name, plan.rows, sample_bytes, memory)
    found.is_cached = None if memory is None else plan.rows * sample_bytes < _TIMES_MEMORY * memory
    # Another one each time: the server may still have the rows of the last benchmark in memory.
    epoch = random.SystemRandom().randrange(1 << 30)

    def attempt(count: int) -> bool:
        report(f"{count} accelerator{'s' * (count != 1)}", min(0.95, _SHARE * len(found.trials)), 0.0)
        job = Job(
            dataset._client.url,
            dataset.name,
            split,
            token,
            deadline,
            dict(options),
            workload.batch_size,
            workload.step,
            _SHARE * seconds,
            epoch + (len(found.trials) << 20),
        )
        found.trials.append(try_accelerators(job, count))
        return found.passed(found.trials[-1])

    _search(attempt, accelerators, most)
    return found


def _search(attempt: Callable[[int], bool], first: int, most: int) -> None:
    """Try `first`, then double it until it fails or there is no more, or halve it until it passes; then bisect."""
    passes, fails = 0, most + 1
    if attempt(first):
        passes = first
        while passes < most and fails > most:
            more = min(2 * passes, most)
            passes, fails = (more, fails) if attempt(more) else (passes, more)
    else:
        fails = first
        while fails > 1 and not passes:
            fewer = fails // 2
            passes, fails = (fewer, fails) if attempt(fewer) else (passes, fewer)
    while fails - passes > 1 and (passes or fails > 1) and fails <= most:
        middle = (passes + fails) // 2
        passes, fails = (middle, fails) if attempt(middle) else (passes, middle)


def _sample_bytes(dataset: Dataset, workload: Workload, batch_bytes: int) -> float:
    """Mean size of a sample of the dataset, in bytes."""
    found = batch_bytes / workload.batch_size
    if abs(found - workload.sample_bytes) > _LIKE * workload.sample_bytes:
        raise BadParameter(
            f"the rows of {dataset.name!r} have {size_of(found)} on average, the samples of {workload.name} "
            f"{size_of(workload.sample_bytes)}: build its data with `h5feed-server workload {workload.name} -o FILE.h5`"
        )
    return found


def _is_here(url: str) -> bool:
    parts = urlsplit(url)
    if parts.scheme == "unix" or parts.hostname == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(parts.hostname or "").is_loopback
    return False


def _own_memory() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _notes(found: Feeding) -> list[str]:
    nbytes = size_of(found.samples * found.sample_bytes)
    notes = []
    if found.is_cached:
        notes.append(
            f"FROM THE PAGE CACHE: the data ({nbytes}) are less than {_TIMES_MEMORY} times the server's memory "
            f"({size_of(found.server_memory or 0)}), so this measures its memory, CPUs and network, not its disk"
        )
    elif found.is_cached is None:
        notes.append(
            f"it is not known whether this is a run FROM THE PAGE CACHE: it is, unless the data ({nbytes}) are "
            f"{_TIMES_MEMORY} times the server's memory. Name it with --server-memory"
        )
    steps = max(trial.steps for trial in found.trials)
    if steps < _STEPS:
        notes.append(f"at most {steps} steps were measured, MLPerf Storage wants {_STEPS}: use more --seconds")
    notes.append("the accelerators run on this machine, and share its CPUs; this is not a verified MLPerf result")
    return notes


def feeding_text(found: Feeding, width: int) -> str:
    """The report."""
    workload = found.workload
    spread = f" ± {size_of(workload.spread)}" if workload.spread else ""
    about = (
        f"{workload.name} of MLPerf Storage {workload.version} on {workload.accelerator}: {workload.batch_size} "
        f"sample{'s' * (workload.batch_size != 1)} of {size_of(workload.sample_bytes)}{spread} in steps of "
        f"{duration(workload.step)}, {size_of(workload.bytes_per_second)}/s for each accelerator, passed from "
        f"{workload.utilisation:.0%} utilisation on (mlcommons/storage, {workload.source})"
    )
    data = f"{found.dataset} at {found.url}: {found.samples:,} samples of {size_of(found.sample_bytes)} on average"
    table = [("accelerators", "utilisation", "samples/s", "MB/s", "steps", "")]
    for trial in sorted(found.trials, key=lambda trial: trial.accelerators):
        table.append(
            (
                str(trial.accelerators),
                f"{trial.utilisation:.1%}",
                f"{trial.samples_per_second:,.{0 if trial.samples_per_second >= 100 else 1}f}",
                f"{trial.bytes_per_second / 1e6:,.0f}",
                str(trial.steps),
                "passed" if found.passed(trial) else "failed",
            )
        )
    return "\n".join(
        [
            *textwrap.wrap(about, width),
            *textwrap.wrap(data, width),
            "",
            *text_lines(table),
            "",
            *(line for sentence in _verdict(found) for line in textwrap.wrap(sentence, width)),
            *(line for note in _notes(found) for line in textwrap.wrap(f"note: {note}", width, subsequent_indent="  ")),
        ]
    )


def _verdict(found: Feeding) -> list[str]:
    asked, least = found.trials[0], found.workload.utilisation
    count = f"{asked.accelerators} accelerator{'s' * (asked.accelerators != 1)}"
    passed = found.passed(asked)
    lines = [
        f"{'PASS' if passed else 'FAIL'}: {count} would be busy {asked.utilisation:.1%} of the time; "
        f"{least:.0%} {'are enough' if passed else 'would be needed'}."
    ]
    most = max(trial.accelerators for trial in found.trials)
    if found.fed and found.fed == most:
        lines.append(
            f"This server feeds at least {found.fed}: the dataset has no samples for more."
            if found.fed * 2 * found.workload.batch_size > found.samples or found.fed == MAX_ACCELERATORS
            else f"This server feeds at least {found.fed}."
        )
    elif found.fed:
        lines.append(f"This server feeds {found.fed}.")
    else:
        rate = max(trial.bytes_per_second for trial in found.trials)
        share = rate / found.workload.bytes_per_second
        lines.append(
            f"This server feeds none: {size_of(rate)}/s arrived, and one needs "
            f"{size_of(found.workload.bytes_per_second)}/s ({share:.0%})."
        )
    return lines
