"""Schemathesis sends what the description allows, and what it does not, and finds nothing wrong."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from h5feed_server.tokens.secrets import digest_of, new_token, proof_of
from h5feed_server.tokens.token_file import TokenRecord, as_line

from tests.support.schemathesis_tokens import IN_SCOPE
from tests.support.server_process import ServerProcess

ROOT = Path(__file__).parents[2]

_CONFIG = """
hooks = "tests.support.{hooks}"
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


def _finds_nothing(
    server: ServerProcess, folder: Path, examples: int, *options: str, hooks: str = "schemathesis_checks"
) -> None:
    config = folder / "schemathesis.toml"
    config.write_text(_CONFIG.format(examples=examples, hooks=hooks))
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


@pytest.fixture(scope="module")
def member(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ServerProcess, str]]:
    """A server with tokens, and one for a single dataset."""
    base = tmp_path_factory.mktemp("members")
    text, name = new_token()
    digest = digest_of(proof_of(text.encode())).hex()
    record = TokenRecord(name="member", id=name, hash=f"sha256:{digest}", datasets=(IN_SCOPE,))
    (base / "tokens").write_text(as_line(record))
    process = ServerProcess(folder, base / "cache", "--token-file", str(base / "tokens"))
    yield process, text
    assert process.stop() == 0


STRANGERS = ("--checks", "strangers_get_401")


def _of(token: str) -> tuple[str, ...]:
    checks = "members_see_their_datasets_alone,not_a_server_error"
    return ("--checks", checks, "-H", f"Authorization: Bearer {token}")


def test_a_sample_without_a_token(member: tuple[ServerProcess, str], tmp_path: Path) -> None:
    """Whatever is sent, nothing but the open endpoints is answered by anything but a 401."""
    _finds_nothing(member[0], tmp_path, 2, "--phases=examples,fuzzing", *STRANGERS, hooks="schemathesis_tokens")


def test_a_sample_with_a_token_for_one_dataset(member: tuple[ServerProcess, str], tmp_path: Path) -> None:
    """Every other dataset is none, in every endpoint."""
    server, token = member
    _finds_nothing(server, tmp_path, 2, "--phases=examples,fuzzing", *_of(token), hooks="schemathesis_tokens")


@pytest.mark.slow
def test_everything_with_tokens(member: tuple[ServerProcess, str], tmp_path: Path) -> None:
    """The same, at the bounds of each parameter and beyond them."""
    server, token = member
    _finds_nothing(server, tmp_path, 30, *STRANGERS, hooks="schemathesis_tokens")
    _finds_nothing(server, tmp_path, 30, *_of(token), hooks="schemathesis_tokens")


@pytest.mark.slow
def test_everything(server: ServerProcess, tmp_path: Path) -> None:
    """Every endpoint, at the bounds of each parameter and beyond them, and requests that follow from each other."""
    _finds_nothing(server, tmp_path, 60)
