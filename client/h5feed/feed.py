"""A server and its datasets."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from .answers import CataloguePage
from .dataset import Dataset
from .errors import BadAnswer, FeedError
from .net.balancing import ReplicaStats
from .net.certificates import Cert, Verify
from .net.client import DEFAULT_DEADLINE, DEFAULT_TIMEOUT, Client
from .net.http import httpx
from .net.servers import Hooks
from .schema import checked
from .tables import titled_table

if TYPE_CHECKING:
    from .mixture import Mixture

_PAGE = 500
"""Catalogue entries per request."""

_MOST_DATASETS = 1 << 20
"""Maximum size of a catalogue."""

_GLANCE_SECONDS = 3.0
"""Timeout of what a notebook shows and completes."""


class Feed:
    """A connection to one or more servers; made by `connect`. ``feed["digits"]`` is a `Dataset`."""

    def __init__(self, client: Client) -> None:
        self._client = client

    @property
    def url(self) -> str:
        return self._client.url

    def datasets(self, q: str | None = None) -> list[dict[str, Any]]:
        """The catalogue: name, revision, rows, fields and status of each dataset. `q` filters by name."""
        listed: list[Any] = []
        while True:
            params = {"limit": str(_PAGE), "offset": str(len(listed))} | ({"q": q} if q else {})
            answer = self._catalogue(params)
            page = answer["datasets"]
            # A server that ignores `offset` would send the same page for ever.
            if len(page) > _PAGE or answer["total"] > _MOST_DATASETS or (listed and page[:1] == listed[:1]):
                raise BadAnswer(f"the catalogue of {self.url} does not end: is it an h5feed server?")
            listed.extend(page)
            if len(listed) >= answer["total"] or not page:
                return listed

    def __iter__(self) -> Iterator[str]:
        return (entry["name"] for entry in self.datasets())

    def __getitem__(self, name: str) -> Dataset:
        return self.dataset(name)

    def dataset(self, name: str, revision: str | None = None) -> Dataset:
        """The dataset `name`; with `revision`, as it was then, if it has grown since.

        Raises
        ------
        DatasetNotFound, Unreadable
        RevisionChanged
            It does not have that revision, and is not a growing dataset that had it.
        """
        return Dataset.opened(self._client, name, revision)

    def mix(self, sources: Mapping[str, float] | Iterable[str], **options: Any) -> Mixture:
        """Mix datasets of this server, given by name. ::

            mixture = feed.mix({"photos": 0.7, "drawings": 0.3})

        Parameters
        ----------
        sources : mapping of str to float, or list of str
            Weights by name of the dataset; or only the names.
        **options
            See `h5feed.mix`, which also mixes datasets of several servers.
        """
        from .mixture import mix

        if isinstance(sources, Mapping):
            return mix({name: (self[name], weight) for name, weight in sources.items()}, **options)
        return mix({name: self[name] for name in sources}, **options)

    @property
    def via(self) -> dict[str, str]:
        """How each server is reached, by URL: ``Unix socket PATH``, or ``TCP`` and why not over a Unix socket."""
        return self._client.via

    @property
    def replicas(self) -> tuple[ReplicaStats, ...]:
        """How many requests each server has answered, and which servers get none at present, and why.

        There is one entry for each URL, or for each address of its host name.
        """
        return self._client.replicas

    def check_there(self) -> None:
        """Raise `ConnectionFailed` within seconds if no server listens at the address."""
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
        """Completions of ``feed["`` in IPython."""
        try:
            return [entry["name"] for entry in self._glance()["datasets"]]
        except FeedError:
            return []

    def _glance(self) -> CataloguePage:
        """The first page of the catalogue, with a short timeout."""
        return self._catalogue({"limit": str(_PAGE)}, min(_GLANCE_SECONDS, self._client.deadline))

    def _catalogue(self, params: Mapping[str, str], deadline: float | None = None) -> CataloguePage:
        return checked(self._client.json("/v1/datasets", params, deadline=deadline), CataloguePage, "catalogue")


def connect(
    url: str | os.PathLike[str] | None = None,
    *,
    token: str | None = None,
    timeout: float | httpx.Timeout = DEFAULT_TIMEOUT,
    deadline: float = DEFAULT_DEADLINE,
    verify: Verify = True,
    cert: Cert | None = None,
    headers: Mapping[str, str] | None = None,
    event_hooks: Hooks | None = None,
    auth: httpx.Auth | tuple[str, str] | None = None,
    local: bool | None = None,
    placement: Literal["cache"] | None = None,
) -> Feed:
    """Connect to an h5feed server, or to several that serve the same files, or open a folder or file of this machine.

    Parameters
    ----------
    url : str or path, optional
        ``http://host:8000``, ``https://host`` or ``unix:///path/to.sock``. Default ``$H5FEED_URL``, else port 8000 on
        this machine. Several servers, ``"http://a:8000,http://b:8000"``, share the requests. A server that fails is
        skipped for a while and tried again; no batch is lost as long as one of them responds.
        ``servers+http://head:8001`` names a list of servers that may change, such as those of a Ray cluster.

        A folder of HDF5 files, or a single file, starts a server for it, which needs the package h5feed-server. Other
        processes of this user that open the same path use the same server. It ends a few seconds after the last of
        them, and is started again if it dies. A str names a path unless it begins with a scheme, such as ``http://``.
    token : str, optional
        Bearer token; default ``$H5FEED_TOKEN``, else the content of the file ``$H5FEED_TOKEN_FILE``. Datasets and loops
        made from this feed keep the token and pickle it. A token from a variable is not pickled; unpickling reads the
        variables again.
    timeout : float or Timeout
        Seconds for one step of a request: connecting, sending, waiting for more data. Pass a `Timeout` of httpx or
        httpx2 to set each step.
    deadline : float
        Seconds for a whole request, including retries. Broken connections and temporary errors (429, 502, 503, 504)
        are retried until then.
    verify : ssl.SSLContext, bool or path
        How to verify ``https`` certificates. A path is a PEM file, or a folder, of the certificates to trust; unlike a
        context, it can be pickled. Default: those of `certifi`, or of ``$SSL_CERT_FILE`` or ``$SSL_CERT_DIR``.
    cert : path or pair of paths, optional
        PEM file with a client certificate and its key, or one file for each, for servers that ask for one.
    headers, event_hooks, auth
        Passed to the client of httpx2 if it is installed, else of httpx.
    local : bool, optional
        Whether requests to ``http://127.0.0.1``, ``http://localhost`` and ``http://[::1]`` may use the server's Unix
        socket, which is faster than TCP. The client first makes sure that the socket belongs to the same server, and
        stays with TCP otherwise; ``stats()`` of a loop, and `Feed.via`, show which it is. Default ``$H5FEED_LOCAL``,
        else True.
    placement : ``"cache"``, optional
        With several servers, each server owns a part of the rows of every dataset, and loops request rows from their
        owners. So the caches of the servers hold different rows. The batches are the same. If owners are not used,
        `stats()` of a loop gives the reason. See "Give each replica a part of the data" in "Run several replicas".
        Default: each request goes to the server that is expected to respond first.

    Raises
    ------
    BadParameter
        `url`, `token` or `placement` is invalid, or there is no such path. To a URL, nothing is sent before the first
        request.
    ConnectionFailed
        The server for a path does not start. The message contains the end of its log.
    """
    return Feed(
        Client(
            url,
            token=token,
            timeout=timeout,
            deadline=deadline,
            verify=verify,
            cert=cert,
            headers=headers,
            event_hooks=event_hooks,
            auth=auth,
            local=local,
            placement=placement,
        )
    )
