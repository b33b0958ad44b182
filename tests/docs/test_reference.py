"""The reference names everything there is: settings, endpoints, errors, commands."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest
from h5feed import errors
from h5feed.options import OrderOptions, SequenceOptions, TorchOptions
from h5feed_server.api.exposition import EXTRA
from h5feed_server.api.openapi import describe
from h5feed_server.api.problems import STATUS
from h5feed_server.main import create_app, metrics_catalogue
from h5feed_server.settings import Settings

ROOT = Path(__file__).parents[2]

DOCS = Path(__file__).parents[2] / "docs"


def _first_cells(page: str) -> set[str]:
    """What stands in the first column of the tables of a page."""
    return set(re.findall(r"^\| `([^`|]+)`", (DOCS / page).read_text(), re.MULTILINE))


def test_settings() -> None:
    """Each has a line, and none is there that is not."""
    assert _first_cells("reference/settings.md") == {f"H5FEED_{name.upper()}" for name in Settings.model_fields}


def test_the_example_of_an_environment() -> None:
    """It has every setting, those of the compose file too, and the compose file passes on what it offers."""
    example = set(re.findall(r"^(?:# )?(\w+)=", (ROOT / ".env.example").read_text(), re.MULTILINE))
    assert {f"H5FEED_{name.upper()}" for name in Settings.model_fields} <= example
    for file in ("docker-compose.yml", "compose.trainer.yml"):
        used = set(re.findall(r"\$\{(\w+)", (ROOT / file).read_text()))
        assert {name for name in used if name.startswith("H5FEED_")} - {"H5FEED_TOKEN"} <= example
    passed = set(re.findall(r"^ +(H5FEED_\w+):", (ROOT / "docker-compose.yml").read_text(), re.MULTILINE))
    inside = {"H5FEED_DATA_DIR", "H5FEED_CACHE_DIR", "H5FEED_HOST", "H5FEED_PORT"}
    assert {f"H5FEED_{name.upper()}" for name in Settings.model_fields} <= passed | inside


def test_options() -> None:
    """Each option of the loops is in the table, and no other."""
    options = {name for of in (OrderOptions, SequenceOptions, TorchOptions) for name in of.__annotations__}
    lines = re.findall(r"^\| (`[^|]+)\|", (DOCS / "reference/client.md").read_text(), re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(lines))) == options


def test_errors() -> None:
    """Each class has a line with the status and the code that are sent."""
    page = (DOCS / "reference/errors.md").read_text()
    for code, cls in errors.CLASS_BY_CODE.items():
        assert f"| {STATUS[cls]} | `{code}` | `{cls.__name__}` |" in page
    for cls in (errors.ConnectionFailed, errors.BadAnswer):
        assert f"| `{cls.code}` | `{cls.__name__}` |" in page


def test_endpoints(tmp_path: Path) -> None:
    """Each has a line, with all its parameters, or a link to the tables that have them."""
    page = (DOCS / "reference/http.md").read_text()
    shared = _first_cells("reference/http.md") | {"shard", "shards"}
    paths = describe(create_app(Settings(data_dir=tmp_path, cache_dir=tmp_path / "cache")))["paths"]
    for path, operations in paths.items():
        for method, operation in operations.items():
            line = next((line for line in page.splitlines() if f"`{method.upper()} {path}`" in line), None)
            assert line is not None, f"{method.upper()} {path} is not there"
            if "as for" in line or "the same" in line:
                continue
            named = set(re.findall(r"`(\w+)`", line)) | (shared if "parameters)" in line else set())
            query = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "query"}
            assert query <= named, f"{method.upper()} {path}: {query - named}"


@pytest.mark.parametrize("command", ["h5feed", "h5feed-server"])
def test_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Each has a line."""
    main = import_module(f"{command.replace('-', '_')}.cli").main
    with pytest.raises(SystemExit):
        main(["--help"])
    found = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    page = (DOCS / "reference/commands.md").read_text()
    assert len(found) >= 4
    for name in found:
        assert f"| `{command} {name}" in page, name


def test_architecture_names_files_that_are_there() -> None:
    """The way of a batch is drawn with the names that the files have."""
    named = set(re.findall(r"[\w/]+\.py", (ROOT / "docs/architecture.md").read_text()))
    packages = ROOT / "client/h5feed", ROOT / "app/h5feed_server"
    assert len(named) > 20
    assert not [name for name in named if not any((package / name).exists() for package in packages)]


def test_metrics() -> None:
    """Each has a line with its type, and none is there that is not."""
    page = (DOCS / "how-to/observe.md").read_text()
    known = {f"h5feed_{metric.name}": metric.kind for metric in (*metrics_catalogue().metrics, *EXTRA)}
    assert dict(re.findall(r"^\| `(h5feed_\w+)` \| (\w+) \|", page, re.MULTILINE)) == known
