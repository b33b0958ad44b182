"""h5web opens served files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
from playwright.sync_api import Page, expect

from tests.support.server_process import ServerProcess
from tests.system.visits import FOLDER

BUILD = FOLDER / "build"
PAGES = {"/h5web.html": FOLDER / "h5web.html", "/h5web.js": BUILD / "h5web.js", "/h5web.css": BUILD / "h5web.css"}


def _write(folder: Path) -> None:
    (folder / "runs").mkdir()
    with h5py.File(folder / "runs" / "scan 1.h5", "w") as file:
        entry = file.create_group("entry")
        values = (np.arange(12).reshape(3, 4) * 11 + 5).astype("<i4")
        data = entry.create_dataset("counts", data=values, chunks=(1, 4), compression="gzip")
        data.attrs["units"] = "photons"
        entry["words"] = np.array(["eins", "zwei", "drei"], h5py.string_dtype())
        entry["half"] = np.array([10.5, 1.25, 2.0], ">f2")
        entry["shortcut"] = h5py.SoftLink("/entry/counts")
        entry["lost"] = h5py.ExternalLink("nowhere.h5", "/x")
        file.attrs["<img src=x onerror=alert(1)>"] = "<script>alert(1)</script>"


def _open(visit: Callable[..., Page], server: ServerProcess, file: str, **options: object) -> Page:
    assert PAGES["/h5web.js"].exists(), "h5web is not bundled: run `make setup-system`"
    return visit(f"{server.url}/h5web.html?file={file}", pages=PAGES, **options)


def test_h5web_shows_values(visit: Callable[..., Page], serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """It shows the tree, the values of arrays, text and attributes."""
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder)
    page = _open(visit, serve(folder), "runs/scan%201.h5")
    page.get_by_role("treeitem", name="entry").click()
    page.get_by_role("treeitem", name="counts").click()
    page.get_by_role("tab", name="Matrix").click()
    for value in ("5.000e+0", "1.600e+1", "1.260e+2"):
        expect(page.get_by_role("gridcell", name=value, exact=True)).to_be_visible()
    page.get_by_role("treeitem", name="half").click()
    page.get_by_role("tab", name="Matrix").click()
    for value in ("1.050e+1", "1.250e+0", "2.000e+0"):
        expect(page.get_by_text(value, exact=True)).to_be_visible()
    page.get_by_role("treeitem", name="words").click()
    for value in ("eins", "zwei", "drei"):
        expect(page.get_by_text(value, exact=True)).to_be_visible()
    page.get_by_role("treeitem", name="counts").click()
    page.get_by_role("tab", name="Inspect").click()
    expect(page.get_by_text("photons")).to_be_visible()


def test_h5web_says_what_is_missing(
    visit: Callable[..., Page], serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """For a file that is not served, it shows its own message."""
    folder = tmp_path / "data"
    folder.mkdir()
    _write(folder)
    page = _open(visit, serve(folder), "runs/other.h5", may_fail=("404", "File not found"))
    expect(page.get_by_text("File not found: 'runs/other.h5'").first).to_be_visible()
