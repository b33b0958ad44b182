"""Pages as a browser shows them: headless Chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import ServerProcess

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


def test_docs_page_groups_and_offers(server: ServerProcess, tmp_path: Path) -> None:
    """Parameters stand below headings; fields and splits are offered as the dataset that is chosen has them."""
    page = _rendered(f"{server.url}/docs#/batches/get_batch", tmp_path)
    found = re.findall(r'<tr class="heading"><th colspan="2">([^<]*)</th>|<tr data-param-name="(\w+)"', page)
    order = [heading or name for heading, name in found]
    assert order.index("Order") < order.index("shuffle") < order.index("Splits that are drawn") or (
        order.index("Splits that are drawn") < order.index("test") < order.index("Order") < order.index("shuffle")
    )
    fields = re.search(r'<datalist id="fields-of-mixed">(.*?)</datalist>', page)
    assert fields and 'value="images"' in fields[1] and 'value="labels"' in fields[1]
    for name in ("fields", "stratify", "weights"):
        assert re.search(rf'<tr data-param-name="{name}".*?<input[^>]*list="fields-of-mixed"', page), name
    assert re.search(r'<tr data-param-name="split".*?<input[^>]*list="splits-of-mixed"', page)
    assert 'value="train"' in page
