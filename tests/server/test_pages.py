"""The page of the OpenAPI description as a browser shows it: headless Chromium, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import httpx
import pytest

from tests.support.server_process import ServerProcess

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

_FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
_FLAGS += "--disable-component-update --disable-sync --virtual-time-budget=20000 --window-size=1280,2400"


def _rendered(url: str, profile: Path) -> str:
    """The page's document after its scripts have run."""
    assert CHROMIUM is not None
    command = [CHROMIUM, *_FLAGS.split(), f"--user-data-dir={profile}", "--dump-dom", url]
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
def test_docs_page(server: ServerProcess, tmp_path: Path) -> None:
    """One endpoint, opened by its link: parameters stand below headings, and what is there can be chosen."""
    page = _rendered(f"{server.url}/docs#/batches/get_batch", tmp_path)
    assert "One batch" in page and "Failed to load" not in page
    found = re.findall(r'<tr class="heading"><th colspan="2">([^<]*)</th>|<tr data-param-name="(\w+)"', page)
    order = [heading or name for heading, name in found]
    assert order.index("Order") < order.index("shuffle") < order.index("Rows by class or weight")
    assert order.index("Splits that are drawn") < order.index("test") < order.index("Order")
    offered = {
        name: re.findall(r'value="([^"]*)"', options)
        for name, options in re.findall(r'<select [^>]*aria-label="(\w+)"[^>]*>(.*?)</select>', page)
    }
    assert offered["name"] == ["mixed", "sub.small", "tall"]
    assert {"all", "train", "val", "test"} <= set(offered["split"])
    for name in ("fields", "stratify", "weights"):
        assert "labels" in offered[name]


@pytest.mark.parametrize("path", ["/docs", "/redoc"])
def test_pages_hold_no_script(server: ServerProcess, path: str) -> None:
    """Scripts come from this server alone, and none stands in the page; the policy says so to the browser."""
    with httpx.Client(base_url=server.url, timeout=60) as http:
        answer = http.get(path)
        directives = dict(item.split(maxsplit=1) for item in answer.headers["content-security-policy"].split("; "))
        assert (directives["default-src"], directives["script-src"]) == ("'none'", "'self'")
        assert directives["frame-ancestors"] == directives["form-action"] == directives["base-uri"] == "'none'"
        assert re.findall(r"<script[^>]*>(.*?)</script>", answer.text, re.DOTALL) == [""] * answer.text.count("<script")
        assert "<style" not in answer.text and not re.search(r"\son\w+=|\sstyle=|https?://", answer.text)
        for asset in re.findall(r'<(?:script|link)[^>]* (?:src|href)="([^"]+)"', answer.text):
            assert http.get(asset).status_code == 200, asset
