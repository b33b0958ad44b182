"""Pages as a browser shows them: headless Chromium, where there is one."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import httpx
import pytest
from conftest import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
_FLAGS += "--disable-component-update --disable-sync --virtual-time-budget=20000 --window-size=1280,2400"


def _rendered(url: str, profile: Path) -> str:
    """The page's document after its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS.split(), f"--user-data-dir={profile}", "--dump-dom", url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


def test_docs_page_offers_the_datasets(server: ServerProcess, tmp_path: Path) -> None:
    """The page of one endpoint, opened by its link: its parameters are described, the datasets are there to choose."""
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    operation = schema["paths"]["/v1/datasets/{name}/batches/{index}"]["get"]
    page = _rendered(f"{server.url}/docs#/batches/{operation['operationId']}", tmp_path)
    assert "One batch" in page
    for name in ("mixed", "sub.small", "tall"):
        assert name in page
    for parameter in ("split_seed", "shuffle", "batch_size"):
        assert parameter in page
    assert "Failed to load" not in page
