"""One visit to a page: what it asks for, what goes wrong in it, and who could not use it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, Request

FOLDER = Path(__file__).parent

TIMEOUT_MS = 60_000
"""How long a page may take to do anything, on a machine that is busy with something else."""

_LOCAL_SCHEMES = ("about", "blob", "data")


class Visit:
    """A page in a context of its own.

    Parameters
    ----------
    url : str
        Opened at once; requests may go to its host and port only.
    width, height : int
        Of the window, in pixels.
    dark : bool
        Whether the browser prefers dark pages.
    javascript : bool
        Whether scripts of the page run.
    headers : mapping of str to str, optional
        Sent with each request, such as a token.
    pages : mapping of str to Path, optional
        Files that are answered for paths of this host, beside what the server has.
    may_fail : sequence of str
        Parts of error messages that the page may report.
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
        context.on("weberror", lambda error: self._errors.append(str(error.error)))
        for path, file in (pages or {}).items():
            origin = f"{urlsplit(url).scheme}://{self._host}"
            context.route(f"{origin}{path}", lambda route, file=file: route.fulfill(path=file))
            context.route(f"{origin}{path}?*", lambda route, file=file: route.fulfill(path=file))
        self.page: Page = context.new_page()
        self.page.goto(url)

    def check(self) -> None:
        """Fail if a request went elsewhere, or an error was reported."""
        assert not self._foreign, f"requests left the machine: {self._foreign[:5]}"
        errors = [text for text in self._errors if not any(part in text for part in self._may_fail)]
        assert not errors, f"the page reported errors: {errors[:5]}"

    def _note_request(self, request: Request) -> None:
        address = urlsplit(request.url)
        if address.scheme not in _LOCAL_SCHEMES and address.netloc != self._host:
            self._foreign.append(request.url)

    def _note_console(self, message: ConsoleMessage) -> None:
        if message.type == "error":
            self._errors.append(f"{message.text} ({message.location.get('url', '')})")


def serious_findings(page: Page) -> list[str]:
    """What axe-core finds on the page that is serious or critical, one line each; none if all can use it."""
    source = FOLDER / "node_modules/axe-core/axe.min.js"
    assert source.exists(), "axe-core is not there: run `make setup-system`"
    # Not as a script of the page, which the page's own policy would refuse.
    page.evaluate(source.read_text())
    found = page.evaluate("() => axe.run()")
    return [
        f"{one['id']}: {one['help']}: {node['html'][:200]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
        for node in one["nodes"]
    ]
