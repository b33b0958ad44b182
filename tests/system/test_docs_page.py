"""The OpenAPI pages as a person uses them: everything can be chosen, tried, seen and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py
import httpx
import numpy as np
import pytest
from playwright.sync_api import Locator, Page, expect

from tests.support.server_process import ServerProcess
from tests.system.visits import TIMEOUT_MS

expect.set_options(timeout=TIMEOUT_MS)

Visitor = Callable[..., Page]


def _opened(page: Page, operation: str) -> Locator:
    """The block of one endpoint, which the page's address has opened."""
    block = page.locator(f"[id^=operations-][id$=-{operation}]")
    expect(block.get_by_role("button", name="Execute")).to_be_visible()
    return block


def _tried(block: Locator) -> Locator:
    """What the server has answered to the values that are filled in."""
    block.get_by_role("button", name="Execute").click()
    answer = block.locator(".live-responses-table")
    expect(answer.locator("tbody .response-col_status").first).to_have_text("200")
    return answer


def _choices(block: Locator, parameter: str) -> list[str]:
    chooser = block.locator(f"select[aria-label={parameter}]")
    expect(chooser).to_be_visible()
    return [option.get_attribute("value") or "" for option in chooser.locator("option").all()]


def test_splits_and_statistics(visit: Visitor, server: ServerProcess) -> None:
    """The values that are filled in run as they are, and the answers are shown."""
    answer = _tried(_opened(visit(f"{server.url}/docs#/splits/get_splits"), "get_splits"))
    expect(answer).to_contain_text('"train_test_split')
    expect(answer).to_contain_text('"digest"')
    block = _opened(visit(f"{server.url}/docs#/statistics/get_stats"), "get_stats")
    block.locator("select[aria-label=field]").select_option("labels")
    expect(_tried(block)).to_contain_text('"name": "fish"')


def test_an_endpoint_without_a_dataset(visit: Visitor, server: ServerProcess) -> None:
    """Its parameters are shown, and the page reports no error."""
    block = _opened(visit(f"{server.url}/docs#/datasets/list_datasets"), "list_datasets")
    expect(_tried(block)).to_contain_text('"name": "mixed"')


def test_datasets_splits_and_fields_are_chosen(visit: Visitor, server: ServerProcess) -> None:
    """From lists of what is there; with another dataset come its own fields and splits."""
    block = _opened(visit(f"{server.url}/docs#/batches/get_batch"), "get_batch")
    assert _choices(block, "name") == ["mixed", "sub.small", "tall"]
    assert {"all", "train", "val", "test"} <= set(_choices(block, "split"))
    assert {"images", "labels", "half"} <= set(_choices(block, "fields"))
    assert "labels" in _choices(block, "weights") and "images" not in _choices(block, "weights")
    block.locator("select[aria-label=fields]").select_option(["images", "labels"])
    _tried(block)
    expect(block.locator(".request-url")).to_contain_text("fields=images%2Clabels")
    block.locator("select[aria-label=name]").select_option("sub.small")
    expect(block.locator("select[aria-label=fields] option")).to_have_text(["x", "y"])
    assert _choices(block, "stratify") == ["", "none", "x", "y"]
    _tried(block)
    expect(block.locator(".request-url")).to_contain_text("/sub.small/batches/0")
    expect(block.locator(".request-url")).not_to_contain_text("images")


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_are_shown(visit: Visitor, server: ServerProcess, form: str) -> None:
    """In place, as large as they are, and can be kept under a name that tells what they show."""
    block = _opened(visit(f"{server.url}/docs#/pictures/get_image"), "get_image")
    block.locator("tr[data-param-name=format] select").select_option(form)
    picture = _tried(block).get_by_role("img", name=f"mixed-rows-0-image.{form}")
    expect(picture).to_be_visible()
    # As the file has it: 12 × 10 pixels.
    shape = picture.evaluate("image => image.decode().then(() => [image.naturalHeight, image.naturalWidth])")
    assert shape[0] * 10 == shape[1] * 12
    with block.page.expect_download() as download:
        block.get_by_role("link", name="Download").click()
    assert download.value.suggested_filename == f"mixed-rows-0-image.{form}"
    wanted = httpx.get(f"{server.url}/v1/datasets/mixed/rows/0/image", params={"format": form}, timeout=60)
    assert Path(download.value.path()).read_bytes() == wanted.content


@pytest.mark.parametrize("form", ["npz", "safetensors"])
def test_a_batch_is_kept(visit: Visitor, server: ServerProcess, folder: Path, form: str) -> None:
    """Readable at first; as a file under its own name, with the rows of the file."""
    block = _opened(visit(f"{server.url}/docs#/batches/get_batch"), "get_batch")
    expect(_tried(block)).to_contain_text('"__rows__"')
    block.locator("tr[data-param-name=format] select").select_option(form)
    block.locator("select[aria-label=fields]").select_option("labels")
    link = _tried(block).get_by_role("link", name="Download file")
    with block.page.expect_download() as download:
        link.click()
    assert download.value.suggested_filename == f"mixed-batches-0.{form}"
    kept = Path(download.value.path())
    if form == "npz":
        with np.load(kept) as tensors, h5py.File(folder / "mixed.h5") as file:
            np.testing.assert_array_equal(tensors["labels"], file["labels"][tensors["__rows__"]])
    else:
        url = f"{server.url}/v1/datasets/mixed/batches/0?batch_size=32&fields=labels&format={form}"
        wanted = httpx.get(url, timeout=60)
        assert kept.read_bytes() == wanted.content


def test_authorize(visit: Visitor, serve: Callable[..., ServerProcess], folder: Path) -> None:
    """Who has a token gives it once: then names can be chosen, and requests are answered."""
    server = serve(folder, H5FEED_TOKENS="first-one,second-one")
    page = visit(f"{server.url}/docs#/datasets/get_dataset", may_fail=["401"])
    block = _opened(page, "get_dataset")
    expect(block.locator("tr[data-param-name=name] select")).to_have_count(0)
    page.locator(".auth-wrapper button.authorize").first.click()
    page.locator(".auth-container input").fill("second-one")
    page.locator(".auth-btn-wrapper button.authorize").click()
    page.locator(".auth-btn-wrapper button.btn-done").click()
    expect(block.locator("select[aria-label=name] option").first).to_have_text("mixed")
    expect(_tried(block)).to_contain_text('"class_names"')


def test_names_are_text(visit: Visitor, serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """Names that are markup are shown as they are."""
    hostile = "<img src=x onerror=document.title='owned'>, \"quoted\" & 50 %"
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "<b>bold<b>.h5", "w") as file:
        file[hostile.replace("/", "")] = np.arange(40.0)
        file["y"] = np.arange(40) % 2
    server = serve(tmp_path / "data")
    page = visit(f"{server.url}/docs#/batches/get_batch")
    block = _opened(page, "get_batch")
    assert _choices(block, "name") == ["<b>bold<b>"]
    assert hostile in _choices(block, "fields")
    block.locator("select[aria-label=fields]").select_option(hostile)
    expect(_tried(block)).to_contain_text("onerror")
    assert page.title() == "h5feed – API"


def test_the_reference_to_read(visit: Visitor, server: ServerProcess) -> None:
    """`/redoc` shows every endpoint, and no link to send what is read to somebody else."""
    schema = httpx.get(f"{server.url}/openapi.json", timeout=60).json()
    page = visit(f"{server.url}/redoc", width=1600)
    expect(page.get_by_role("heading", name="datasets")).to_be_visible()
    for path in schema["paths"]:
        # Sections are filled when they come near.
        page.keyboard.press("PageDown")
        page.mouse.wheel(0, 2000)
        expect(page.get_by_text(path, exact=True).first).to_be_attached()
    page.get_by_role("button", name="Show").first.click()
    expect(page.get_by_role("heading", name=schema["paths"]["/v1/datasets"]["get"]["summary"])).to_be_visible()
    assert page.get_by_text("ChatGPT").count() == page.get_by_text("Claude").count() == 0
