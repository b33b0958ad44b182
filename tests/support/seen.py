"""Pages as somebody sees them who has no browser: their elements and texts."""

from __future__ import annotations

from html.parser import HTMLParser
from urllib.parse import urlsplit

import httpx


class Seen(HTMLParser):
    """What a page has: elements, links, pictures, and text."""

    def __init__(self, content: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def links(self) -> list[str]:
        return [str(one["href"]) for one in self.all("a") if one.get("href")]


def seen(http: httpx.Client, path: str, status: int = 200) -> Seen:
    """A page, checked for what holds of all pages."""
    answer = http.get(path)
    assert answer.status_code == status, (path, answer.text[:2000])
    policy = answer.headers["content-security-policy"]
    assert "script-src 'self';" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert "access-control-allow-origin" not in answer.headers
    page = Seen(answer.text)
    assert len(page.all("main")) == 1 and len(page.all("h1")) == 1 and page.all("html")[0]["lang"] == "en"
    for tag, attributes in page.elements:
        assert not [name for name in attributes if name.startswith("on")], (path, tag, attributes)
        assert "style" not in attributes and tag not in ("style", "iframe", "object", "embed", "base")
        assert tag != "script" or str(attributes["src"]).startswith("/explorer/")
        assert tag != "img" or (attributes["alt"] and str(attributes["src"]).startswith(("/datasets/", "/v1/")))
        for name in ("href", "src", "action"):
            target = urlsplit(str(attributes.get(name) or "/"))
            assert not target.scheme and not target.netloc, (path, tag, attributes)
    return page
