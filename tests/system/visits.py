"""Visits of pages: records requests and errors, and checks accessibility."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Dialog, Page, Request, Route

FOLDER = Path(__file__).parent

TIMEOUT_MS = 60_000
"""Deadline for everything that a page does, also on a busy machine."""

_LOCAL_SCHEMES = ("about", "blob", "data")


class Visit:
    """A page in its own browser context.

    Parameters
    ----------
    url : str
        Address of the page. Requests may go only to its host and port.
    width, height : int
        Size of the window, in pixels.
    dark : bool
        Whether the browser prefers dark pages.
    javascript : bool
        Whether the page may run scripts.
    headers : mapping of str to str, optional
        Headers of every request, such as a token.
    pages : mapping of str to Path, optional
        Files that are served for paths of this host, in addition to those of the server.
    may_fail : sequence of str
        Parts of error messages that are expected.
    """

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        width: int = 1400,
        height: int = 900,
        dark: bool = False,
        javascript: bool = True,
        headers: Mapping[str, str] | None = None,
        pages: Mapping[str, Path] | None = None,
        may_fail: Sequence[str] = (),
    ) -> None:
        self._host = urlsplit(url).netloc
        self._may_fail = may_fail
        self._foreign: list[str] = []
        self._errors: list[str] = []
        context = browser.new_context(
            viewport={"width": width, "height": height},
            color_scheme="dark" if dark else "light",
            java_script_enabled=javascript,
            extra_http_headers=dict(headers or {}),
            service_workers="block",
        )
        context.set_default_timeout(TIMEOUT_MS)
        context.on("request", self._note_request)
        context.on("console", self._note_console)
        context.on("dialog", self._note_dialog)
        context.on("weberror", lambda error: self._errors.append(str(error.error)))
        for path, file in (pages or {}).items():
            context.route(self._is_at(path), _fulfilled_by(file))
        self.page: Page = context.new_page()
        self.page.goto(url)

    def check(self) -> None:
        """Check that no request went to another host and that the page reported no error."""
        assert not self._foreign, f"requests left the machine: {self._foreign[:5]}"
        errors = [text for text in self._errors if not any(part in text for part in self._may_fail)]
        assert not errors, f"the page reported errors: {errors[:5]}"

    def _is_at(self, path: str) -> Callable[[str], bool]:
        return lambda address: urlsplit(address)[1:3] == (self._host, path)

    def _note_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in _LOCAL_SCHEMES and address.netloc != self._host:
            self._foreign.append(request.url)

    def _note_dialog(self, dialog: Dialog) -> None:
        """No page opens one: it would be a script from a file."""
        self._errors.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._errors.append(f"{message.text} ({message.location.get('url', '')})")


def _fulfilled_by(file: Path) -> Callable[[Route], None]:
    return lambda route: route.fulfill(path=file)


_LINKS = (
    "[...document.querySelectorAll('a[href]')].map(a => new URL(a.getAttribute('href'), a.baseURI).href.split('#')[0])"
)


def crawled(page: Page, url: str, most: int) -> set[str]:
    """Follow up to `most` links, each kind of page with each set of parameters once; returns the paths of the pages."""
    seen: set[tuple[str, frozenset[str]]] = set()
    found: set[str] = set()
    waiting = [f"{url}/"]
    while waiting and len(seen) < most:
        address = waiting.pop(0)
        parts = urlsplit(address)
        key = (
            re.sub(r"[0-9]+", "0", parts.path.removeprefix(urlsplit(url).path)),
            frozenset(re.findall(r"([^&=]+)=", parts.query)),
        )
        if key in seen or "format=json" in parts.query:
            continue
        seen.add(key)
        if parts.path.startswith(f"{urlsplit(url).path}/v1/") or parts.path.endswith("/view"):
            # No pages: the browser would save data, and ask for an icon of the host for a picture.
            data = page.request.get(address)
            assert data.ok, (address, data.status)
            continue
        answer = page.goto(address)
        assert answer is not None and answer.status < 400, (address, answer and answer.status)
        page.wait_for_load_state("networkidle")
        broken = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        assert not broken, (address, broken)
        found.add(parts.path)
        hrefs = page.evaluate(_LINKS)
        # Licences and the like are elsewhere; what is on this host is to be below the prefix.
        waiting += [one for one in dict.fromkeys(hrefs) if urlsplit(one).netloc == urlsplit(url).netloc]
    return found


def serious_findings(page: Page) -> list[str]:
    """Return the serious and critical findings of axe-core, one line each."""
    source = FOLDER / "node_modules/axe-core/axe.min.js"
    assert source.exists(), "axe-core is not installed: run `make setup-system`"
    # Not add_script_tag, which the content security policy of the page would refuse.
    page.evaluate(source.read_text())
    found = page.evaluate("() => axe.run()")
    return [
        f"{one['id']}: {one['help']}: {node['html'][:200]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
