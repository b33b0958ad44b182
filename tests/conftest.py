"""Real servers over real HDF5 files on real sockets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import h5feed
import pytest
from hypothesis import HealthCheck, settings

from tests.support.data_folder import write_data_folder
from tests.support.environment import begin_alike
from tests.support.sampling import mark_what_is_left_out
from tests.support.server_process import ServerProcess

begin_alike()

# What Hypothesis tries is the same each time, so that nobody's change fails by another one's bad luck.
settings.register_profile(
    "alike", derandomize=True, deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow]
)
settings.register_profile("thorough", settings.get_profile("alike"), max_examples=300)
settings.load_profile("alike")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Before it is decided which tests run: the rest of what is sampled is slow."""
    mark_what_is_left_out(items)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Callable[..., ServerProcess]]:
    """Starts servers that end with the test: ``serve(folder, "--workers", "2", H5FEED_MAX_ROWS="10")``."""
    started: list[ServerProcess] = []

    def start(folder: Path | str, *options: str, **environment: str) -> ServerProcess:
        server = ServerProcess(folder, tmp_path / f"cache{len(started)}", *options, **environment)
        started.append(server)
        return server

    yield start
    for server in started:
        server.stop()


@pytest.fixture(scope="module")
def serve_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., ServerProcess]]:
    """As `serve`, for servers of all tests of a module, which are to end well."""
    started: list[ServerProcess] = []

    def start(folder: Path | str, *options: str, **environment: str) -> ServerProcess:
        server = ServerProcess(folder, tmp_path_factory.mktemp("cache"), *options, **environment)
        started.append(server)
        return server

    yield start
    assert [server.stop() for server in started] == [0] * len(started)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The data folder of `write_data_folder`."""
    path = tmp_path_factory.mktemp("data")
    write_data_folder(path)
    return path


@pytest.fixture(scope="session")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """One server of two workers over `folder`, for all tests that do not change it."""
    process = ServerProcess(folder, tmp_path_factory.mktemp("cache"), "--workers", "2")
    yield process
    assert process.stop() == 0


@pytest.fixture(scope="module")
def feed(server: ServerProcess) -> Iterator[h5feed.Feed]:
    """Connected to `server`, which may be one of the module."""
    with h5feed.connect(server.url, deadline=60) as connected:
        yield connected
