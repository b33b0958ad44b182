"""A server as a mapping of dataset names to datasets."""

from __future__ import annotations

import ssl
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any
from urllib.parse import quote

from .answers import CataloguePage, DatasetInfo
from .dataset import Dataset
from .errors import BadAnswer, FeedError
from .net.client import DEFAULT_DEADLINE, DEFAULT_TIMEOUT, Client
from .net.http import httpx
from .net.servers import Hooks
from .schema import checked
from .tables import titled_table

_PAGE = 500
"""Catalogue entries asked for at once."""

_MOST_DATASETS = 1 << 20
"""Bound on a catalogue."""

_GLANCE_SECONDS = 3.0
"""How long the server may take to tell what a notebook completes and shows: nobody waits longer for that."""


class Feed:
    """What a server serves; made by `connect`. ``feed["digits"]`` is a `Dataset`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def url(self) -> str:
        return self._client.url

    def datasets(self, q: str | None = None) -> list[dict[str, Any]]:
        """The catalogue: name, revision, rows, fields and status of everything served; `q` filters by name."""
        listed: list[Any] = []
        while True:
            params = {"limit": str(_PAGE), "offset": str(len(listed))} | ({"q": q} if q else {})
            answer = self._catalogue(params)
            page = answer["datasets"]
            # What goes on for ever is a server that does not heed `offset`, or worse.
            if len(page) > _PAGE or answer["total"] > _MOST_DATASETS or (listed and page[:1] == listed[:1]):
                raise BadAnswer(f"{self.url} has no catalogue of pages that end: is an h5feed server there?")
            listed.extend(page)
            if len(listed) >= answer["total"] or not page:
                return listed

    def __iter__(self) -> Iterator[str]:
        return (entry["name"] for entry in self.datasets())

    def __getitem__(self, name: str) -> Dataset:
        info = self._client.json(f"/v1/datasets/{quote(name, safe='')}")
        checked(info, DatasetInfo, "dataset")
        return Dataset(self._client, info)

    def check_there(self) -> None:
        """Raise `ConnectionFailed`, within seconds, where no server listens; else nothing is waited for."""
        self._client.check_there()

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def __enter__(self) -> Feed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Feed {self.url}>"

    def _repr_html_(self) -> str:
        try:
            answer = self._glance()
        except FeedError as error:
            return titled_table(f"{self.url}: {error}", (), ())
        rows = [
            (
                entry["name"],
                "" if entry["rows"] is None else f"{entry['rows']:,}",
                ", ".join(f"{field['name']}: {field['dtype']}{field['shape']}" for field in entry["fields"]),
                ": ".join(filter(None, (entry["status"], entry["reason"]))),
            )
            for entry in answer["datasets"]
        ]
        total = answer["total"]
        shown = "" if total == len(rows) else f", the first {len(rows):,} of them"
        return titled_table(f"{self.url}: {total:,} datasets{shown}", ("dataset", "rows", "fields", "status"), rows)

    def _ipython_key_completions_(self) -> list[str]:
        """What IPython completes ``feed["`` to."""
        try:
            return [entry["name"] for entry in self._glance()["datasets"]]
        except FeedError:
            return []

    def _glance(self) -> CataloguePage:
        """The first page of the catalogue, or soon an error."""
        return self._catalogue({"limit": str(_PAGE)}, min(_GLANCE_SECONDS, self._client.deadline))

    def _catalogue(self, params: Mapping[str, str], deadline: float | None = None) -> CataloguePage:
        return checked(self._client.json("/v1/datasets", params, deadline=deadline), CataloguePage, "catalogue")


def connect(
    url: str | None = None,
    *,
    token: str | None = None,
    timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
    deadline: float = DEFAULT_DEADLINE,
    verify: ssl.SSLContext | bool = True,
    headers: Mapping[str, str] | None = None,
    event_hooks: Hooks | None = None,
    auth: httpx.Auth | tuple[str, str] | None = None,
) -> Feed:
    """Connect to an h5feed server, or to several that serve the same files.

    Parameters
    ----------
    url : str, optional
        ``http://host:8000``, ``https://host`` or ``unix:///path/to.sock``. Default ``$H5FEED_URL``, else the loopback.
        Several, ``"http://a:8000,http://b:8000"``, share the requests out; one that fails is left out for a while and
        tried again, and no batch is lost as long as any of them answers.
    token : str, optional
        Bearer token; default ``$H5FEED_TOKEN``. Whatever is made of this feed holds it, and pickles with it; one from
        the variable is left out of pickles, and looked up anew where they are read.
    timeout : float or Timeout
        Seconds for one step of an exchange: connecting, sending, waiting for the next bytes. A `Timeout` of httpx or
        httpx2 has one for each.
    deadline : float
        Seconds for one request in all, with its retries. Broken connections and errors that pass (429, 502, 503, 504)
        are tried again until then.
    verify : ssl.SSLContext or bool
        How ``https`` certificates are checked.
    headers, event_hooks, auth
        Handed to the client of httpx2 where that is installed, else of httpx.

    Raises
    ------
    BadParameter
        `url` is no such address, or no header can carry `token`. Nothing is sent before the first request.
    """
    return Feed(
        Client(
            url,
            token=token,
            timeout=timeout,
            deadline=deadline,
            verify=verify,
            headers=headers,
            event_hooks=event_hooks,
            auth=auth,
        )
    )
