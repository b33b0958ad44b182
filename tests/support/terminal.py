"""What a program prints on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import struct
import subprocess
import termios
from collections.abc import Sequence


def on_terminal(command: Sequence[str]) -> str:
    """The output, with its control sequences, of a program that ends well on a terminal of 80 columns and colours."""
    ours, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 80, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color"}
    for name in ("NO_COLOR", "COLUMNS"):
        environment.pop(name, None)
    process = subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal, env=environment)
    os.close(terminal)
    output = b""
    with contextlib.suppress(OSError):
        while received := os.read(ours, 65536):
            output += received
    os.close(ours)
    assert process.wait(60) == 0
    return output.decode()
