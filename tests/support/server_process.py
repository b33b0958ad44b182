"""A server of its own for a test: a real process on a free port."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
from pathlib import Path

from .fork_server import SERVERS


class ServerProcess:
    """A server process of its own, started on a free port."""

    new_session = False
    """Whether it has no terminal, whoever runs the tests."""

    def __init__(self, folder: Path | str, cache_dir: Path, *options: str, **environment: str) -> None:
        self.folder = Path(folder)
        self._served = str(folder)
        self.cache_dir = cache_dir
        self._options = options
        self._environment = environment
        self.port = 0
        self.start()

    def start(self) -> None:
        """Start it, on the port that it had before."""
        arguments = ["serve", self._served, "--cache-dir", str(self.cache_dir)]
        options = [*self._options]
        if "--port" in options:
            options[options.index("--port") + 1] = str(self.port or options[options.index("--port") + 1])
        elif "--uds" not in options:
            options += ["--port", str(self.port)]
        self.process = SERVERS.start(
            [*arguments, *options], {**os.environ, **self._environment}, new_session=self.new_session
        )
        ready, _, _ = select.select([self.process.stdout], [], [], 60)
        line = self.process.stdout.readline() if ready else ""
        assert " at " in line, f"the server did not start: {line!r}"
        # Where the log is JSON, so is this line.
        said = json.loads(line)["message"] if line.startswith("{") else line
        self.url = said.rsplit(" at ", 1)[1].strip()
        if self.url.startswith("http"):
            self.port = int(self.url.rsplit(":", 1)[1])

    @property
    def socket(self) -> str:
        """The path of its Unix socket."""
        return self._options[self._options.index("--uds") + 1]

    def worker_pids(self) -> list[int]:
        """Process ids of its workers, but not of inspectors."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return [int(pid) for pid in children]

    def working_pids(self) -> list[int]:
        """Process ids of the workers that hold the lock of a job."""
        found = []
        for pid in self.worker_pids():
            try:
                links = [os.readlink(descriptor) for descriptor in Path(f"/proc/{pid}/fd").iterdir()]
            except OSError:
                continue
            if any("/jobs/" in link and link.endswith(".lock") for link in links):
                found.append(pid)
        return found

    def unfinished_jobs(self) -> list[str]:
        """Kinds of the jobs that are not over, by what is written down of them."""
        # After a line that says whether what follows is whole.
        files = [path.read_bytes().split(b"\n", 1)[1] for path in self.cache_dir.glob("served-*/jobs/*.json")]
        states = [json.loads(content) for content in files]
        return [state["kind"] for state in states if state["status"] in ("queued", "running")]

    def kill(self) -> None:
        """SIGKILL, to the supervisor and its workers: nothing is said to anybody."""
        workers = self.worker_pids()
        for pid in [self.process.pid, *workers]:
            os.kill(pid, signal.SIGKILL)
        self.process.wait(60)

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
