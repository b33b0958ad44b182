"""The pages that people read, and a reader who runs what stands in them, from the top to the bottom."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5feed
import httpx
import pytest
import yaml

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "client" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

SECONDS = 300
"""Deadline of one command, on a machine that is busy with something else."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """Where its text begins, counted from 1."""
    language: str
    text: str
    needs: frozenset[str]
    """Packages, by ``<!-- needs: torch -->`` on the line above."""
    skipped: str | None
    """Why it is not run, by ``<!-- not run: REASON -->`` on the line above."""

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path, text: str | None = None) -> Iterator[Block]:
    """All of a page, or of the text that is to stand in it, in order."""
    lines = (page.read_text() if text is None else text).splitlines()
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r" *(```+|~~~+)(.*)", lines[number])
        if fence is None:
            number += 1
            continue
        end = next(after for after in range(number + 1, len(lines)) if lines[after].strip() == fence[1])
        mark = re.fullmatch(r" *<!-- (needs|not run):(.*)-->", lines[number - 1])
        kind, words = (mark[1], mark[2].strip()) if mark else ("", "")
        yield Block(
            page=page,
            line=number + 2,
            language=fence[2].strip(),
            text=textwrap.dedent("\n".join(lines[number + 1 : end])) + "\n",
            needs=frozenset(words.split()) if kind == "needs" else frozenset(),
            skipped=words if kind == "not run" else None,
        )
        number = end + 1


class Reader:
    """Runs blocks in one folder, and all Python in one session, as somebody does who reads a page to its end.

    Parameters
    ----------
    demo
        Runs ``make demo``, which takes half a minute, or gives what it has left before: the folder and what it printed.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, demo: Callable[[], tuple[Path, str]]) -> None:
        self.folder = folder
        self.names: dict[str, Any] = {"__name__": "page", "_shell": self.shell, "_variable": self.variable}
        self.printed = ""
        """By all commands."""
        self._patch, self._demo = patch, demo
        self._ports: dict[str, int] = {}
        self._servers: dict[int, ServerProcess] = {}
        patch.chdir(folder)
        (folder / "home").mkdir()
        patch.setenv("HOME", str(folder / "home"))
        patch.setenv("COLUMNS", "120")
        patch.delenv("KERAS_BACKEND", raising=False)
        patch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))

    def run(self, block: Block) -> None:
        """As its language says; one that nobody has thought of is an error."""
        text = self._with_addresses(block.text)
        name = re.match(r"# ([\w./-]+\.\w+)\n", text)
        if name is not None:
            (self.folder / name[1]).write_text(text)
        if block.language == "python":
            if name is None:
                self._python(text, block)
        elif block.language == "sh":
            self.shell(text)
        elif block.language == "console":
            self._console(text)
        elif block.language == "toml":
            assert name is not None, f"{block}: its first line is to say which file it is, such as # data/h5feed.toml"
            tomllib.loads(text)
        elif block.language == "yaml":
            # A part of a manifest or of a program's settings.
            assert isinstance(yaml.safe_load(text), dict)
        else:
            # What a command prints, of other data or on another machine.
            assert block.language == "text", f"{block}: nothing is known of how to run {block.language!r}"

    def shell(self, text: str) -> str:
        """Run commands, each as it stands or as `INSTEAD` says; returns what they printed."""
        printed, plain = "", ""
        for command in [*text.replace("\\\n", "").splitlines(), None]:
            instead = None if command is None else self._instead(command)
            if command is not None and instead is None:
                plain += command + "\n"
                continue
            if plain.strip():
                printed += self._bash(plain)
                plain = ""
            if instead is not None:
                printed += instead() or ""
        self.printed += printed
        return printed

    def variable(self, assignment: str) -> None:
        """``%env NAME=VALUE`` of a notebook."""
        name, _, value = assignment.partition("=")
        self._patch.setenv(name, value)

    def not_served(self) -> list[dict[str, Any]]:
        """What lies in the data folders and is no sound dataset."""
        found = []
        for server in self._servers.values():
            with h5feed.connect(server.url, deadline=SECONDS) as feed:
                # What the last block has written may be inspected still.
                wait_until(lambda feed=feed: all(entry["status"] != "preparing" for entry in feed.datasets()))  # type: ignore[misc]
                found += [entry for entry in feed.datasets() if entry["reason"]]
        return found

    def close(self) -> None:
        """End the servers, and the loops and feeds that the page leaves to the end of its session."""
        for thing in reversed(self.names.values()):
            if type(thing).__module__.startswith("h5feed.") and hasattr(thing, "close"):
                thing.close()
        for server in self._servers.values():
            server.stop()

    def serve(self, words: list[str]) -> None:
        options = [word for word in words[3:] if word != "&"]
        port = self._port(options[options.index("--port") + 1] if "--port" in options else "8000")
        if port in self._servers:
            self._servers.pop(port).stop()
        assert (self.folder / words[2]).is_dir(), f"{words[2]} is not there"
        cache = self.folder / f"cache{port}"
        self._servers[port] = ServerProcess(self.folder / words[2], cache, *options, "--port", str(port))

    def demo(self, words: list[str]) -> str:
        folder, printed = self._demo()
        shutil.copytree(folder, self.folder, dirs_exist_ok=True)
        return printed

    def bench(self, words: list[str]) -> str:
        return self._bash(shlex.join([*words, "--seconds", "2"]))

    def installed(self, words: list[str]) -> None:
        names = words[2:]
        while "-r" in names:
            at = names.index("-r")
            requirements = httpx.get(names[at + 1], timeout=SECONDS).raise_for_status().text
            assert f"/h5feed-{importlib.metadata.version('h5feed')}-py3-none-any.whl#sha256=" in requirements
            del names[at : at + 2]
        for word in names:
            wheel = re.fullmatch(r"\./(\w+)-([\d.]+)-py3-none-any\.whl", word)
            version = importlib.metadata.version(wheel[1] if wheel else word)
            assert wheel is None or wheel[2] == version

    def compose(self, words: list[str]) -> None:
        if subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode == 0:
            subprocess.run(["docker", "compose", "-f", str(ROOT / "docker-compose.yml"), "config", "-q"], check=True)

    def nothing(self, words: list[str]) -> None:
        pass

    def _instead(self, command: str) -> Callable[[], str | None] | None:
        try:
            words = shlex.split(command, comments=True)
        except ValueError:
            return None
        for begin, instead in INSTEAD.items():
            if words[: len(begin.split())] == begin.split():
                return lambda: instead(self, words)
        return None

    def _bash(self, script: str) -> str:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", script + "\nwait"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
        assert done.returncode == 0, f"{script}\nended with {done.returncode}:\n{done.stdout}"
        return done.stdout

    def _python(self, text: str, block: Block) -> None:
        text = re.sub(r"^(?:!|%(?=pip ))(.*)$", lambda line: f"_shell({line[1]!r})", text, flags=re.MULTILINE)
        text = re.sub(r"^%env (\S+).*$", lambda line: f"_variable({line[1]!r})", text, flags=re.MULTILINE)
        # With the page's own line numbers in tracebacks.
        exec(compile("\n" * (block.line - 1) + text, block.page, "exec"), self.names)
        # Keras is there since an earlier page; in a session of the reader's own it would look for TensorFlow.
        uses_keras = re.search(r"import keras|\.sequence\(", text)
        assert not uses_keras or "KERAS_BACKEND" in os.environ, f"{block}: nothing says which backend Keras has"

    def _console(self, text: str) -> None:
        first, *parts = re.split(r"^\$ (.*)\n", text, flags=re.MULTILINE)
        assert not first and parts, "a console block begins with $ and a command"
        for command, shown in zip(parts[::2], parts[1::2], strict=True):
            check_printed(shown, self.shell(command))

    def _with_addresses(self, text: str) -> str:
        text = text.replace("https://your-server", "http://127.0.0.1:8000")
        return re.sub(
            r"(gpu-box|127\.0\.0\.1|localhost):(\d+)", lambda found: f"127.0.0.1:{self._port(found[2])}", text
        )

    def _port(self, shown: str) -> int:
        """A free one, in place of the one that the page shows."""
        if shown not in self._ports:
            with socket.create_server(("127.0.0.1", 0)) as free:
                self._ports[shown] = free.getsockname()[1]
        return self._ports[shown]


INSTEAD: dict[str, Callable[[Reader, list[str]], str | None]] = {
    "h5feed-server serve": Reader.serve,  # on a free port, and until the page ends, as in a terminal of its own
    "h5feed bench": Reader.bench,  # for 2 seconds, not 20
    "make demo": Reader.demo,  # once for all pages, which are given what it leaves
    "h5feed-server demo --keep data": Reader.demo,  # is what make demo runs
    "make test": Reader.nothing,  # is what runs this
    "pip install": Reader.installed,  # is there: a client of this version, and whatever else is named
    "docker compose up": Reader.compose,  # no container, but the file is one that compose understands
}
"""What is done in place of commands that begin so. All else, addresses and ports apart, is run as it stands."""


def check_printed(shown: str, printed: str) -> None:
    """What a page shows is what was printed, line by line, apart from numbers; ``…`` stands for any lines."""
    pattern = "".join(r"(?:.*\n)*" if line == "…" else re.escape(line) + r"\n" for line in alike(shown))
    found = "\n".join(alike(printed)) + "\n"
    assert re.fullmatch(pattern, found), f"shown is\n{shown}\nand printed is\n{found}"


def alike(text: str) -> list[str]:
    """Lines as a terminal shows them in the end: colours apart, with # for each number and time."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    lines = [re.split(r"[\r\b]+", line.rstrip("\r\b"))[-1] for line in text.split("\n")]
    marks = [
        (r"\d[\d,]*(\.\d+)?(e[-+]\d+)?", "#"),
        (r"# ?(ns|us|µs|ms|s)\b", "# s"),
        (r"[━─═]+", "━"),
        (r"\s+", " "),
    ]
    for mark, short in marks:
        lines = [re.sub(mark, short, line).strip() for line in lines]
    return [line for line in lines if line]
