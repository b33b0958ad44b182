"""Schemathesis sends what the description allows, and what it does not, and finds nothing wrong."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.server_process import ServerProcess

ROOT = Path(__file__).parents[2]

_CONFIG = """
hooks = "tests.support.schemathesis_checks"
seed = 1
request-timeout = 60.0
continue-on-failure = true

[generation]
deterministic = true
max-examples = {examples}

[dictionaries.datasets]
values = ["mixed", "sub.small", "tall"]

[dictionaries.fields]
values = ["images", "labels", "half", "text", "x", "y"]

[dictionaries.splits]
values = ["all", "train", "val", "test"]

[parameters]
"path.name" = {{ dictionary = "datasets", probability = 0.9 }}
"path.split" = {{ dictionary = "splits", probability = 0.8 }}
"query.split" = {{ dictionary = "splits", probability = 0.8 }}
"query.field" = {{ dictionary = "fields", probability = 0.8 }}
"query.fields" = {{ dictionary = "fields", probability = 0.8 }}
"query.stratify" = {{ dictionary = "fields", probability = 0.5 }}
"query.group" = {{ dictionary = "fields", probability = 0.5 }}
"query.weights" = {{ dictionary = "fields", probability = 0.5 }}

# Values can be valid one by one and contradict each other or the data, which no schema can say.
[checks.positive_data_acceptance]
expected-statuses = ["2xx", 400, 404, 406, 409, 413, 422, 431]

[checks.negative_data_rejection]
expected-statuses = ["4xx", 503]
"""


def _finds_nothing(server: ServerProcess, folder: Path, examples: int, *options: str) -> None:
    config = folder / "schemathesis.toml"
    config.write_text(_CONFIG.format(examples=examples))
    program = str(Path(sys.executable).with_name("schemathesis"))
    command = [program, "--config-file", str(config), "--no-color", "run"]
    done = subprocess.run(
        [*command, *options, f"{server.url}/openapi.json"],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=390,
    )
    assert done.returncode == 0, done.stdout[-10_000:] + done.stderr[-2000:]


def test_a_sample(server: ServerProcess, tmp_path: Path) -> None:
    """Every endpoint, with its examples and a few more."""
    _finds_nothing(server, tmp_path, 3, "--phases=examples,fuzzing")


@pytest.mark.slow
def test_everything(server: ServerProcess, tmp_path: Path) -> None:
    """Every endpoint, at the bounds of each parameter and beyond them, and requests that follow from each other."""
    _finds_nothing(server, tmp_path, 60)
