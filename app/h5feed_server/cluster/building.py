"""The command ``h5feed-server build --ray``: the nodes of a Ray cluster write the files of a build."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from h5feed.errors import BadParameter, FeedError

from .. import __version__
from ..builder.command import run_build
from ..builder.crew import Job
from ..builder.journal import Journal
from ..builder.placed_rows import PlacedRows
from ..builder.plan import Part
from ..builder.progress import Progress
from .connecting import connected
from .node_actors import Lost, Node, NodeActors
from .node_builder import BuilderReport, NodeBuilder, Task

START_SECONDS = 600.0
"""The build fails if no node has taken part for this long."""

_MOST_LOSSES = 3
"""The build fails if so many processes have ended while they made the same file."""

_PATIENCE_SECONDS = 30.0
"""If no node has taken part for this long, a line says what the build waits for."""

_LOOK_SECONDS = 0.25

_URL = re.compile(r"[a-z][a-z0-9+.-]*:/")


def run_build_on_cluster(options: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises
    ------
    FeedError
    """
    for path in (options.source, options.output):
        if _URL.match(str(path)):
            raise BadParameter(f"{path} is a URL, which cannot be combined with --ray: pass paths that all nodes share")
    options.source, options.output = Path(options.source).absolute(), Path(options.output).absolute()
    with connected(options.ray) as ray:
        return run_build(options, ClusterCrew(ray, lambda note: print(note, file=sys.stderr)))


class ClusterCrew:
    """The nodes of a cluster. Each makes one file at a time, with as many threads as it lends CPUs.

    What a node has finished is noted in the journal here, as soon as it is on the disk: if the node is lost, another
    makes the rest.

    Parameters
    ----------
    ray : module
        Connected to the cluster.
    on_note : callable
        Told which nodes fail, and why.
    """

    def __init__(self, ray: Any, on_note: Callable[[str], None]) -> None:
        self._ray = ray
        self._on_note = on_note

    def make_rows(self, job: Job, rows: PlacedRows, journal: Journal) -> int:
        placed = self._ray.put(rows)
        missing = job.wanted & ~journal.done
        tasks = []
        for number, (path, parts) in enumerate(job.plan.files.items()):
            own = np.concatenate([part.rows for part in parts])
            if missing[own].any():
                tasks.append(Task(number, path.name, placed, own[missing[own]]))
        total, written = int(job.wanted.sum()), 0

        def hear(report: BuilderReport) -> None:
            nonlocal written
            if report.blocks:
                journal.add(report.blocks)
                written += sum(len(one.rows) - len(one.broken) for one in report.blocks) * rows.row_bytes
            job.on_progress(Progress("rows", int(journal.done.sum()), total, written))

        def rest(task: Task) -> Task | None:
            left = task.missing[~journal.done[task.missing]]
            return Task(task.number, task.name, placed, left) if len(left) else None

        self._check(job)
        self._do(job, tasks, hear, rest)
        return written

    def lay_out(self, job: Job, rows: PlacedRows, files: dict[Path, tuple[Part, ...]], written: int) -> None:
        placed = self._ray.put(rows)
        none = np.zeros(0, np.int64)
        tasks = [
            Task(number, path.name, placed, none, path, parts) for number, (path, parts) in enumerate(files.items())
        ]
        total, done = sum(len(task.rows) for task in tasks), 0

        def hear(report: BuilderReport) -> None:
            nonlocal done
            # A file that is begun again is counted again.
            done = min(total, done + report.rows)
            job.on_progress(Progress("layout", done, total, written))

        self._do(job, tasks, hear, lambda task: task)

    def _check(self, job: Job) -> None:
        if len(job.plan.files) == 1:
            self._on_note("note: a single file is built by only one node: to use all nodes, pass --shards")

    def _do(
        self,
        job: Job,
        tasks: Sequence[Task],
        hear: Callable[[BuilderReport], None],
        rest: Callable[[Task], Task | None],
    ) -> None:
        """Have the tasks done. `rest` returns what is left of one whose node was lost."""
        if tasks:
            _Work(self._ray, job, tasks, hear, rest, self._on_note).run()


class _Work:
    """Tasks, and who does them."""

    def __init__(
        self,
        ray: Any,
        job: Job,
        tasks: Sequence[Task],
        hear: Callable[[BuilderReport], None],
        rest: Callable[[Task], Task | None],
        on_note: Callable[[str], None],
    ) -> None:
        self._ray, self._job, self._hear, self._rest, self._on_note = ray, job, hear, rest, on_note
        self._waiting = deque(tasks)
        self._given: dict[str, Task] = {}
        """The tasks under way, by the id of the node."""
        self._ready: set[str] = set()
        """Nodes whose builder has started: others may wait for free CPUs, and must not keep a task meanwhile."""
        self._unfit: dict[str, str] = {}
        self._losses: Counter[int] = Counter()
        self._actors = NodeActors(ray, self._make, self._order)

    def run(self) -> None:
        """Return when all tasks are done.

        Raises
        ------
        FeedError, OSError, RuntimeError
        """
        heard_at = time.monotonic()
        is_told = False
        try:
            while self._waiting or self._given:
                for node, report in self._actors.reports(_LOOK_SECONDS):
                    if isinstance(report, Lost):
                        self._lose(node, report)
                    else:
                        heard_at = time.monotonic()
                        self._take(node, report)
                silent = time.monotonic() - heard_at
                if silent > _PATIENCE_SECONDS and not is_told:
                    self._on_note("waiting for nodes with free CPUs: see `ray status`, or pass a smaller --threads")
                    is_told = True
                if silent > START_SECONDS or not self._may_go_on():
                    raise FeedError(self._nobody())
        finally:
            self._actors.close()

    def _make(self, node: Node) -> tuple[type, int, tuple[Any, ...]] | None:
        if not node.cpus:
            # Such as a head node that is to be spared.
            return None
        threads = min(node.cpus, self._job.options.threads or node.cpus)
        arguments = (__version__, self._job.path, self._job.options, self._job.source.digest, threads)
        return NodeBuilder, threads, arguments

    def _order(self, node: Node) -> tuple[Task | None]:
        """A task for a node without one, if there is one."""
        can = node.id in self._ready and node.id not in self._unfit and node.id not in self._given
        if not can or not self._waiting:
            return (None,)
        self._given[node.id] = self._waiting.popleft()
        return (self._given[node.id],)

    def _take(self, node: Node, report: BuilderReport) -> None:
        self._ready.add(node.id)
        self._hear(report)
        if report.error is not None:
            raise report.error
        if report.unfit and node.id not in self._unfit:
            self._unfit[node.id] = f"node {node.address} cannot take part: {report.unfit}"
            self._on_note(self._unfit[node.id])
            self._give_back(node)
        elif report.finished is not None:
            del self._given[node.id]

    def _lose(self, node: Node, lost: Lost) -> None:
        self._ready.discard(node.id)
        task = self._given.get(node.id)
        again = "" if task is None else f"; {task.name} is made by another process"
        self._on_note(f"node {node.address}: {lost.why}{again}")
        if task is not None and not lost.has_left:
            self._losses[task.number] += 1
            if self._losses[task.number] >= _MOST_LOSSES:
                raise FeedError(f"{task.name}: {_MOST_LOSSES} processes have ended while they made it: {lost.why}")
        self._give_back(node)

    def _give_back(self, node: Node) -> None:
        task = self._given.pop(node.id, None)
        if task is not None and (left := self._rest(task)) is not None:
            self._waiting.appendleft(left)

    def _may_go_on(self) -> bool:
        """Whether any node takes part, or may."""
        nodes = self._actors.nodes
        return not nodes or any(node.id not in self._unfit for node in nodes)

    def _nobody(self) -> str:
        reasons = "; ".join(self._unfit.values())
        return f"no node of the cluster can build: {reasons or f'none has had free CPUs for {START_SECONDS:.0f} s'}"
