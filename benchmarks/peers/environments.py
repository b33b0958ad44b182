"""A virtual environment for each peer: they want different versions of the same packages."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parents[2] / ".venv-peers"
"""Kept for the next time; 5 GB with all of them."""

_INSTALL_SECONDS = 1200.0


@dataclass(frozen=True)
class Environment:
    """A virtual environment.

    Attributes
    ----------
    name : str
        Of its folder.
    packages : tuple of str
        For pip.
    """

    name: str
    packages: tuple[str, ...]

    @property
    def python(self) -> Path:
        return FOLDER / self.name / "bin" / "python"

    def missing(self) -> str:
        """Install it, unless that was done before; returns why that is not possible, or nothing."""
        done = FOLDER / self.name / "installed.json"
        if done.exists() and json.loads(done.read_text()) == list(self.packages):
            return ""
        try:
            subprocess.run([sys.executable, "-m", "venv", "--clear", FOLDER / self.name], check=True)
            # pip and not uv, which leaves out indexes that are folders.
            subprocess.run(
                [self.python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *self.packages],
                check=True,
                capture_output=True,
                text=True,
                timeout=_INSTALL_SECONDS,
            )
        except subprocess.TimeoutExpired:
            return f"not installed within {_INSTALL_SECONDS:.0f} s"
        except subprocess.CalledProcessError as error:
            lines = [line for line in (error.stderr or "").splitlines() if line.startswith("ERROR")]
            return f"cannot be installed: {lines[-1] if lines else error}"
        done.write_text(json.dumps(list(self.packages)))
        return ""


TORCH = Environment("torch", ("torch==2.13.0", "numpy", "h5py"))
TENSORFLOW = Environment("tensorflow", ("tensorflow-cpu==2.20.0", "h5py"))
FLIGHT = Environment("flight", ("pyarrow", "numpy", "h5py"))
LITDATA = Environment("litdata", ("torch==2.13.0", "litdata", "h5py"))
LANCE = Environment("lance", ("pylance", "numpy", "h5py"))
H5GROVE = Environment("h5grove", ("h5grove[fastapi]", "uvicorn", "numpy"))
HSDS = Environment("hsds", ("hsds", "h5pyd", "h5py"))
