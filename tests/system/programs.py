"""Programs that stand before a server: nginx, Caddy and Jupyter, configured as the documentation says."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.support.waiting import wait_until

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "docs/how-to/deploy.md"
PROGRAMS = Path(__file__).parent / "build/programs"
JUPYTER = PROGRAMS / "bin/jupyter"


def blocks_of(language: str, page: Path = DEPLOY) -> list[str]:
    """The blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def running(command: Sequence[str], folder: Path, port: int, **environment: str) -> Iterator[Path]:
    """Run a program until the block ends, which begins when it listens; yields the path of what it says."""
    log = folder / "log"
    environment = {**os.environ, "HOME": str(folder), "XDG_DATA_HOME": str(folder), **environment}
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stdout=file, stderr=file, start_new_session=True)

    def listens() -> bool:
        assert process.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_until(listens)
        yield log
    finally:
        process.terminate()
        try:
            process.wait(60)
        finally:
            process.kill()


def nginx(folder: Path, servers: str) -> list[str]:
    """The command for an nginx with these blocks, all files of which are in a folder."""
    paths = "".join(
        f"{kind}_temp_path {folder}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = folder / "nginx.conf"
    config.write_text(
        f"daemon off;\npid {folder}/pid;\nuser root;\nerror_log {folder}/error.log;\nevents {{}}\n"
        f"http {{\naccess_log off;\n{paths}{servers}}}\n"
    )
    return ["nginx", "-c", str(config), "-p", str(folder)]


def caddy(folder: Path, sites: str) -> list[str]:
    """The command for a Caddy with these sites."""
    config = folder / "Caddyfile"
    config.write_text(f"{{\n\tadmin off\n\tauto_https off\n}}\n{sites}")
    return caddy_with(config)


def caddy_with(config: Path) -> list[str]:
    """The command for a Caddy with a file of one's own."""
    program = shutil.which("caddy") or str(Path(sys.executable).parent / "caddy")
    return [program, "run", "--config", str(config), "--adapter", "caddyfile"]


def below_h5feed(folder: Path, server_port: int, port: int) -> list[str]:
    """The nginx of the documentation, which publishes a server below /h5feed/."""
    block = blocks_of("nginx")[0].replace("127.0.0.1:8000", f"127.0.0.1:{server_port}")
    return nginx(folder, block.replace("listen 8080", f"listen {port}"))
