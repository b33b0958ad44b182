"""What may import what, what the packages hold, and that every error code has its class."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from pathlib import Path

import h5feed
import pytest
from h5feed import errors
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]

HEAVY = ("h5py", "fastapi", "starlette", "uvicorn", "keras", "jax", "torch", "tensorflow", "sklearn", "pydantic")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)


def test_the_client_is_light() -> None:
    """h5feed imports where none of the heavy packages is installed."""
    code = f"""
import sys
for name in {HEAVY!r}:
    sys.modules[name] = None
import h5feed, h5feed.cli
assert not any(name.startswith("h5feed_server") for name in sys.modules)
"""
    done = run(code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "banned"),
    [
        ("h5feed_server.main", ("h5py", "sklearn", "keras")),
        ("h5feed_server.batches.batcher", ("h5py", "fastapi", "starlette", "uvicorn")),
        ("h5feed_server.storage.reader", ("h5py", "fastapi", "h5feed_server.catalog", "h5feed_server.splits")),
        ("h5feed_server.splits.compute", ("h5py", "fastapi", "h5feed_server.storage", "h5feed_server.catalog")),
        ("h5feed_server.catalog.catalog", ("h5py", "fastapi", "h5feed_server.api", "h5feed_server.splits")),
    ],
)
def test_who_may_import_whom(module: str, banned: tuple[str, ...]) -> None:
    """The layers hold: what serves knows no libhdf5, what reads knows no HTTP."""
    done = run(f"import sys, {module}\nprint([name for name in {banned!r} if name in sys.modules])")
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


PUBLIC = [
    "AmbiguousKey",
    "BadAnswer",
    "BadParameter",
    "Batch",
    "BatchOutOfRange",
    "ConnectionFailed",
    "Dataset",
    "DatasetCorrupt",
    "DatasetNotFound",
    "Feed",
    "FeedError",
    "Field",
    "FieldNotFound",
    "HostNotAllowed",
    "InternalError",
    "JobWanted",
    "KeysNotFound",
    "Loader",
    "MethodNotAllowed",
    "Mixture",
    "NotAcceptable",
    "NotFound",
    "Overloaded",
    "PageNotFound",
    "Preparing",
    "ReadTimeout",
    "ReaderCrashed",
    "RevisionChanged",
    "RowOutOfRange",
    "Source",
    "SourceUnavailable",
    "SplitImpossible",
    "SplitNotFound",
    "Splits",
    "Stats",
    "TooLarge",
    "TooManyRequests",
    "Transient",
    "Unauthorized",
    "Unreadable",
    "UnsupportedField",
    "WeightsUnknown",
    "__version__",
    "class_balanced",
    "connect",
    "mix",
    "reopen",
]


def test_public_names() -> None:
    """The public surface is this and no more."""
    assert h5feed.__all__ == PUBLIC == sorted(PUBLIC)
    for name in PUBLIC:
        assert getattr(h5feed, name) is not None
    errors = {
        name
        for name, value in vars(h5feed.errors).items()
        if isinstance(value, type) and value.__module__ == "h5feed.errors"
    }
    assert errors <= set(PUBLIC)


CODES = [
    "bad_parameter",
    "unauthorized",
    "dataset_not_found",
    "field_not_found",
    "split_not_found",
    "batch_out_of_range",
    "row_out_of_range",
    "keys_not_found",
    "weights_unknown",
    "not_acceptable",
    "revision_changed",
    "too_large",
    "unsupported_field",
    "ambiguous_key",
    "split_impossible",
    "unreadable",
    "too_many_requests",
    "dataset_corrupt",
    "source_unavailable",
    "preparing",
    "job_wanted",
    "overloaded",
    "reader_crashed",
    "read_timeout",
]


def test_every_code_has_its_class_and_status() -> None:
    """The contract's codes are classes under FeedError with a status; unknown ones are told as such."""
    from h5feed_server.api.problems import STATUS

    assert set(CODES) <= set(errors.CLASS_BY_CODE)
    assert set(STATUS) == set(errors.CLASS_BY_CODE.values())
    assert isinstance(errors.from_problem(404, {"code": "field_not_found", "detail": "d"}), errors.FieldNotFound)
    assert isinstance(errors.from_problem(503, {}), errors.Overloaded)
    assert isinstance(errors.from_problem(418, {"code": "teapot"}), errors.BadAnswer)


def _names(requirements: Iterable[str]) -> set[str]:
    lines = (line.partition("#")[0].strip() for line in requirements)
    return {canonicalize_name(Requirement(line).name) for line in lines if line}


@pytest.mark.parametrize(
    ("pinned", "project", "extras"),
    [("server", ROOT, ()), ("trainer", ROOT / "client", ("decode", "cli", "keras"))],
)
def test_the_images_install_all_that_is_required(pinned: str, project: Path, extras: tuple[str, ...]) -> None:
    about = tomllib.loads((project / "pyproject.toml").read_text())["project"]
    needed = about["dependencies"] + [line for extra in extras for line in about["optional-dependencies"][extra]]
    missing = _names(needed) - _names((ROOT / "requirements" / f"{pinned}.txt").read_text().splitlines()) - {"h5feed"}
    assert not missing


@pytest.mark.slow
def test_wheels(tmp_path: Path) -> None:
    """Both wheels build, hold one package each, and the client's runs alone."""
    uv = Path(sys.executable).with_name("uv")
    for source in (ROOT / "client", ROOT):
        subprocess.run([uv, "build", "--quiet", "--wheel", "--out-dir", tmp_path, source], check=True, timeout=120)
    tops = {
        wheel.name.split("-")[0]: {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
        for wheel in tmp_path.glob("*.whl")
    }
    assert tops == {
        "h5feed": {"h5feed", "h5feed-0.1.0.dist-info"},
        "h5feed_server": {"h5feed_server", "h5feed_server-0.1.0.dist-info"},
    }
    (server,) = tmp_path.glob("h5feed_server-*.whl")
    held = zipfile.ZipFile(server).namelist()
    for file in ("docs.html", "static/docs.js", "static/swagger-ui/swagger-ui-bundle.js", "static/swagger-ui/LICENSE"):
        assert f"h5feed_server/api/{file}" in held
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    (wheel,) = tmp_path.glob("h5feed-*.whl")
    pins: list[str | Path] = ["-c", ROOT / "requirements" / "server.txt"]
    subprocess.run([uv, "pip", "install", "--quiet", "--python", python, *pins, wheel], check=True, timeout=120)
    shown = subprocess.run([home / "bin" / "h5feed", "--help"], capture_output=True, text=True, check=True)
    assert "examples" in shown.stdout
