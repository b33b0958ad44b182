"""Keeps screenshots of every page, for people to look at: ``python -m tests.system.screens FOLDER [PAGE …]``.

Pages are shown in light and dark, on a phone and on a wide screen. The pictures of the README are taken as well.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import httpx
from h5feed_server.demo import pack_digits
from playwright.sync_api import Browser, sync_playwright

from tests.support.server_process import ServerProcess
from tests.support.shapes import write_shapes
from tests.support.zoo import complete, write_hostile, write_zoo
from tests.system.conftest import launched
from tests.system.visits import Visit

PAGES = {
    "catalogue": "/",
    "dataset-digits": "/datasets/digits",
    "dataset-shapes": "/datasets/shapes",
    "dataset-zoo": "/datasets/zoo",
    "dataset-hostile": "/datasets/hostile",
    "rows-digits": "/datasets/digits/rows",
    "rows-shapes": "/datasets/shapes/rows",
    "rows-filtered": "/datasets/shapes/rows?where=label+in+star%2C+square&where=size+%3E%3D+12&sort=size&order=desc",
    "rows-none": "/datasets/shapes/rows?where=size+%3E+1000",
    "rows-zoo": "/datasets/zoo/rows",
    "rows-hostile": "/datasets/hostile/rows",
    "grid-digits": "/datasets/digits/rows?view=grid",
    "grid-shapes": "/datasets/shapes/rows?view=grid",
    "row-digits": "/datasets/digits/rows/1234",
    "row-shapes": "/datasets/shapes/rows/7",
    "row-zoo": "/datasets/zoo/rows/3",
    "row-hostile": "/datasets/hostile/rows/3",
    "splits-none": "/datasets/digits/splits",
    "splits-digits": "/datasets/digits/splits?test=0.1&val=0.1",
    "splits-shapes": "/datasets/shapes/splits?folds=5&where=size+%3E%3D+10",
    "splits-refused": "/datasets/shapes/splits?test=7.5",
    "tree-shapes": "/datasets/shapes/tree",
    "tree-array": "/datasets/shapes/tree?path=%2Fimage",
    "tree-hostile": "/datasets/hostile/tree",
    "feed": "/feed",
    "error": "/datasets/shapez",
    "openapi": "/docs",
}

README = {
    "explorer-rows.png": ("/datasets/shapes/rows", 1240, 620),
    "explorer-dataset.png": ("/datasets/digits", 1000, 980),
}
IMAGES = Path(__file__).parents[2] / "docs/images"


def main(folder: Path, *names: str) -> None:
    """Take pictures of these pages anew, or of all, and those of the README."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        data = Path(name) / "data"
        data.mkdir()
        pack_digits(data / "digits.h5")
        write_shapes(data / "shapes.h5")
        write_zoo(data / "zoo.h5")
        write_hostile(data / "hostile.h5")
        (data / "interrupted.h5").write_bytes((data / "zoo.h5").read_bytes()[:5000])
        server = ServerProcess(data, Path(name) / "cache")
        try:
            with httpx.Client(base_url=server.url, timeout=60) as http:
                for path in ("/", *(f"/datasets/{one}" for one in ("digits", "shapes", "zoo", "hostile"))):
                    complete(http, path)
                for index in range(20):
                    http.get(f"/v1/datasets/shapes/batches/{index % 8}?batch_size=60").raise_for_status()
            with sync_playwright() as playwright:
                browser = launched(playwright)
                _take_all(browser, server.url, folder, {name: PAGES[name] for name in names or PAGES})
                browser.close()
        finally:
            server.stop()


def _take_all(browser: Browser, url: str, folder: Path, pages: dict[str, str]) -> None:
    for width in (390, 1400):
        for dark in (False, True):
            for name, path in pages.items():
                target = folder / f"{name}-{width}-{'dark' if dark else 'light'}.png"
                _take(browser, f"{url}{path}", target, width, 900, dark=dark, whole=True)
    for file, (path, width, height) in README.items():
        _take(browser, f"{url}{path}", IMAGES / file, width, height)


def _take(
    browser: Browser, url: str, target: Path, width: int, height: int, *, dark: bool = False, whole: bool = False
) -> None:
    visit = Visit(browser, url, width=width, height=height, dark=dark)
    visit.page.wait_for_load_state("networkidle")
    visit.page.screenshot(path=target, full_page=whole)
    visit.page.context.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
