"""What the processes of a server use: memory, descriptors, threads."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import psutil

from .server_process import ServerProcess


def all_processes(server: ServerProcess) -> list[psutil.Process]:
    """The supervisor, its workers, and whatever they have started."""
    supervisor = psutil.Process(server.process.pid)
    return [supervisor, *supervisor.children(recursive=True)]


@dataclass(frozen=True)
class Usage:
    """Of all workers together.

    Attributes
    ----------
    rss : int
        Resident memory in bytes.
    """

    rss: int
    descriptors: int
    threads: int
    connections: int

    @classmethod
    def of(cls, server: ServerProcess) -> Usage:
        rss = descriptors = threads = connections = 0
        for pid in server.worker_pids():
            worker = psutil.Process(pid)
            rss += worker.memory_info().rss
            descriptors += worker.num_fds()
            threads += worker.num_threads()
            with contextlib.suppress(psutil.Error):
                connections += sum(one.status != psutil.CONN_LISTEN for one in worker.net_connections("inet"))
        return cls(rss, descriptors, threads, connections)
