"""Waiting for what happens elsewhere, with a deadline."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import httpx
import psutil


def suspend(*processes: psutil.Process) -> None:
    """SIGSTOP, and return when they stand still: one that is busy starting or stopping takes what comes until then."""
    for process in processes:
        process.suspend()
    for process in processes:
        wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED)  # type: ignore[misc]


def wait_until(condition: Callable[[], bool], seconds: float = 60.0) -> None:
    """Fail unless `condition` becomes true in time, which is long, for a machine that is busy with something else."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


class PatientTransport(httpx.HTTPTransport):
    """Repeats a request while the server says that the files are being inspected, for at most a minute."""

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        deadline = time.monotonic() + 60
        while True:
            answer = super().handle_request(request)
            if answer.status_code != 503 or time.monotonic() > deadline:
                return answer
            if json.loads(answer.read())["code"] != "preparing":
                return answer
            answer.close()
            time.sleep(0.1)
