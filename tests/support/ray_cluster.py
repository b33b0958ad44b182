"""A Ray cluster of several nodes on this machine."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import psutil

_OBJECT_STORE_BYTES = 100 << 20
_ATTEMPTS = 5
"""Ray gives a node 30 seconds to start, which is short on a busy machine."""


class RayCluster:
    """A head node without CPUs, and the nodes that are added to it.

    Attributes
    ----------
    address : str
        For ``--ray``.
    """

    def __init__(self) -> None:
        os.environ.update(RAY_USAGE_STATS_ENABLED="0", RAY_agent_register_timeout_ms="300000")
        from ray.cluster_utils import Cluster

        self._cluster: Any = Cluster()
        self._add(num_cpus=0, include_dashboard=False)
        self.address: str = self._cluster.address

    def add(self, cpus: int = 1) -> Any:
        """A further node."""
        return self._add(num_cpus=cpus)

    def remove(self, node: Any) -> None:
        """Kill a node, without a farewell."""
        self._cluster.remove_node(node, allow_graceful=False)

    def close(self) -> None:
        self._cluster.shutdown()

    def _add(self, **options: Any) -> Any:
        for attempt in range(_ATTEMPTS):
            before = set(psutil.Process().children(recursive=True))
            try:
                return self._cluster.add_node(object_store_memory=_OBJECT_STORE_BYTES, **options, **_ports())
            except Exception as error:
                for process in set(psutil.Process().children(recursive=True)) - before:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        process.kill()
                if attempt == _ATTEMPTS - 1 or "timed out during startup" not in str(error):
                    raise
        raise AssertionError


def _ports() -> dict[str, int]:
    """Free ports for the agents of a node. They would report their own too late on a busy machine."""
    names = ("dashboard_agent_listen_port", "metrics_export_port", "runtime_env_agent_port", "metrics_agent_port")
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in names]
        return {name: one.getsockname()[1] for name, one in zip(names, held, strict=True)}


def processes_of(node: Any) -> list[psutil.Process]:
    """The processes that run on a node, with all that they have started."""
    (raylet,) = [info.process.pid for info in node.all_processes["raylet"]]
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(raylet).children(recursive=True)
    return []


def has_open(process: psutil.Process, path: Path) -> bool:
    """Whether a process has opened a file in a folder."""
    with contextlib.suppress(psutil.Error):
        return any(Path(file.path).parent == path for file in process.open_files())
    return False


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that have not ended."""
    return [one for one in processes if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
