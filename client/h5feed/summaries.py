"""What a server computes of a dataset: splits, statistics, and pictures of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Unpack, overload

import numpy as np
import numpy.typing as npt

from .answers import DatasetInfo, NamedSplits, SplitsInfo, StatsInfo
from .buffers import BufferPool
from .crops import crop_of, crop_text
from .described import Described
from .errors import BadAnswer, Preparing, RevisionChanged
from .fetching.server import only_tensor
from .frames import MAX_BODY_BYTES
from .net import jobs
from .net.balancing import ReplicaStats
from .net.client import Client
from .net.concurrency import Link
from .offsets import offsets_of, offsets_text
from .options import OrderOptions, SplitOptions, split_options
from .pictures import PNG, Picture, PlotKind
from .plan import conditions, parameter, quoted
from .revisions import is_provisional
from .schema import checked
from .splits import Splits, tell_replaced
from .stats import FieldStats, Stats
from .suggestions import check_options
from .weights import GivenWeights
from .wire import ROWS

_SETTLE_POLL_SECONDS = 0.5
"""Interval at which the server is asked whether it has hashed the files."""

_BODY_HEAD_BYTES = 1 << 20
"""Maximum header size of a body that is not a batch."""


class Summaries(Described):
    """The part of `h5feed.Dataset` that asks for splits and statistics; see there for its attributes."""

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        super().__init__(info)
        self._client = client
        self._revision: str = info["revision"]
        self._path = f"/v1/datasets/{quoted(self.name)}"

    @property
    def url(self) -> str:
        """The server, or several with commas between them, or the path that was opened."""
        return self._client.url

    @property
    def via(self) -> str:
        """How the servers are reached: over a Unix socket, or over TCP and why not over a Unix socket."""
        via = self._client.via
        return next(iter(via.values())) if len(via) == 1 else "; ".join(f"{url}: {how}" for url, how in via.items())

    @property
    def replicas(self) -> tuple[ReplicaStats, ...]:
        """What each server has done so far, and which are left out: see `h5feed.Feed.replicas`."""
        return self._client.replicas

    @property
    def revision(self) -> str:
        """The revision of the data: a digest of its content, or a provisional name until a response tells that."""
        return self._client.names.current(self._revision)

    def settle(self) -> str:
        """Wait until the server has hashed the files, and return the revision by content.

        Raises
        ------
        Preparing
            It takes longer than the deadline of the connection.
        RevisionChanged
        """
        deadline = time.monotonic() + self._client.deadline
        while is_provisional(self.revision):
            info = checked(self._client.json(self._path, {"revision": self._revision}), DatasetInfo, "dataset")
            if not is_provisional(self.revision):
                break
            if time.monotonic() + _SETTLE_POLL_SECONDS > deadline:
                hashing = info.get("hashing")
                far = f"{hashing['done']:,} of {hashing['total']:,} bytes" if hashing else "not all of them"
                raise Preparing(
                    f"{self.name!r} has the provisional revision {self._revision}: after {self._client.deadline:g} s, "
                    f"the server has hashed {far}. It goes on; try again later."
                )
            time.sleep(_SETTLE_POLL_SECONDS)
        return self.revision

    def check_is(self, revision: str) -> None:
        """Check that a name stands for these data, which may have another name now.

        If one of the names is provisional, the server is asked.

        Raises
        ------
        RevisionChanged
            It stands for other data, or no server knows it.
        Preparing
            That is not known before the server has hashed the files.
        """
        names = self._client.names
        if names.are_same(revision, self.revision):
            return
        if is_provisional(revision):
            self._client.json(self._path, {"revision": revision})
        elif is_provisional(self.revision):
            self.settle()
        if is_provisional(names.current(revision)) and is_provisional(self.revision):
            self.settle()
            self._client.json(self._path, {"revision": revision})
        if not names.are_same(revision, self.revision):
            raise RevisionChanged(f"{self.name!r} has revision {self.revision}, not {revision}")

    @property
    def pool(self) -> BufferPool:
        """The memory of the batches."""
        return self._client.pool

    @property
    def link(self) -> Link:
        """What streams have learnt about the link to the servers."""
        return self._client.link

    def splits(
        self,
        *,
        classes: str | None = None,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> Splits:
        """Rows, class counts and shares, class weights and digest of each split. Prints as a table.

        The server computes the splits once per revision.

        Parameters
        ----------
        classes : str, optional
            Field whose classes are counted; default: the field used to stratify, or the label.
        timeout : float
            Seconds to wait if the server has to read labels and compute the splits first.
        progress : callable, optional
            Called meanwhile as ``progress(done, total)`` in rows. Each row counts once for every field that is read and
            once for every division of the rows.

        Raises
        ------
        ReadTimeout
        """
        params = self._params(None, options, SplitOptions, self.splits) | (
            {} if classes is None else {"classes": classes}
        )
        ask = partial(self._client.json, f"{self._path}/splits", params, is_job=True)
        answer = checked(jobs.wait_for(ask, "splits", timeout, progress), SplitsInfo, "splits")
        checked(answer["splits"], NamedSplits, "splits")
        if self._how == "inner":
            note = 'rows that the join leaves out (how="inner") are counted, too; plan(split).rows is without them'
            answer["note"] = "; ".join(filter(None, [answer["note"], note]))
        return Splits(self._of_this_revision(answer))

    @overload
    def stats(
        self,
        split: str = "all",
        *,
        field: None = None,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> Stats: ...

    @overload
    def stats(
        self,
        split: str = "all",
        *,
        field: str,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> FieldStats: ...

    def stats(
        self,
        split: str = "all",
        *,
        field: str | None = None,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> Stats | FieldStats:
        """Mean, standard deviation, histogram, classes … of the rows of one split only.

        The server computes them once per revision. Those of a field of a joined dataset are of the partners of these
        rows, each as often as it is one.

        Parameters
        ----------
        field : str, optional
            One field; default: all fields, by name.
        timeout : float
            Seconds to wait if the server has to read the data first.
        progress : callable, optional
            Called meanwhile as ``progress(done, total)`` in bytes.

        Raises
        ------
        ReadTimeout
        """
        of_split = self._params(split, options, SplitOptions, self.stats) | self._joined_params(field)
        params = of_split | ({} if field is None else {"field": field})
        ask = partial(self._client.json, f"{self._path}/stats", params, is_job=True)
        answer = checked(jobs.wait_for(ask, "statistics", timeout, progress), StatsInfo, "statistics")
        found = Stats(self._of_this_revision(answer), partial(self._plot, of_split, timeout))
        if answer["replaces"]:
            tell_replaced(self.name, self._revision, split_options(options), answer["note"] or "")
        if field is None:
            return found
        if field not in found:
            raise BadAnswer(f"requested statistics of {field!r}, but received those of {', '.join(found)}")
        return found[field]

    def _joined_params(self, field: str | None) -> dict[str, Any]:
        """The parameters of joins that the statistics of a field, or of all, depend on."""
        if not self._joins or (field is not None and self._how is None and self.owner_of(field)[0] is self):
            return {}
        return self._all_joins

    def _plot(self, of_split: Mapping[str, Any], timeout: float, field: str | None, kind: PlotKind | None) -> Picture:
        """A plot of statistics of a split; see `Stats.plot`."""
        params = {
            **of_split,
            **{name: value for name, value in (("field", field), ("kind", kind)) if value is not None},
        }
        ask = partial(self._client.content, f"{self._path}/stats/plot", params, PNG, is_job=True)
        return Picture(jobs.wait_for(ask, "statistics", timeout, None))

    def mean_image(self, field: str, split: str = "all", **options: Unpack[SplitOptions]) -> npt.NDArray[np.float32]:
        """The mean image of a field over the rows of one split only, (*sample,) float32."""
        params = self._params(split, options, SplitOptions, self.mean_image) | {"field": field}
        params |= self._joined_params(field)
        shape = self.fields[field].shape if field in self.fields else ()
        most = min(_BODY_HEAD_BYTES + 4 * math.prod(shape), MAX_BODY_BYTES)
        ask = partial(self._client.body, f"{self._path}/stats/mean-image", params, max_bytes=most, is_job=True)
        body = jobs.wait_for(ask, "statistics", jobs.TIMEOUT, None)
        image, _ = only_tensor(body, "mean_image", "float32", self.revision, self._client.names)
        if image.shape != shape:
            raise BadAnswer(f"received a mean image of shape {list(image.shape)}, expected {list(shape)}")
        return image

    def split_rows(
        self,
        split: str,
        *,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> npt.NDArray[np.int64]:
        """Row ids of a split, ascending, (rows,) int64. `timeout` and `progress` are those of `splits`."""
        params = self._params(None, options, SplitOptions, self.split_rows)
        most = min(_BODY_HEAD_BYTES + 8 * self.rows, MAX_BODY_BYTES)
        path = f"{self._path}/splits/{quoted(split)}/rows"
        ask = partial(self._client.body, path, params, max_bytes=most, is_job=True)
        body = jobs.wait_for(ask, "rows of the split", timeout, progress)
        rows, about = only_tensor(body, ROWS, "int64", self.revision, self._client.names)
        if rows.ndim != 1 or (rows.size and (rows[0] < 0 or rows[-1] >= self.rows or (np.diff(rows) <= 0).any())):
            raise BadAnswer(f"the row ids of {split!r} must be ascending and below {self.rows:,}, but are not")
        if "replaced" in about:
            tell_replaced(self.name, self._revision, split_options(options), about["replaced"])
        return rows

    def _of_this_revision(self, answer: Any) -> Any:
        if not self._client.names.are_same(answer["revision"], self.revision):
            raise BadAnswer(
                f"requested revision {self.revision} of {self.name!r}, but received {answer['revision']}: a proxy or "
                "cache between client and server mixes up responses"
            )
        return answer

    def _params(
        self, split: str | None, options: Mapping[str, Any], known: type, takes: Callable[..., Any]
    ) -> dict[str, Any]:
        check_options(options, takes, known.__annotations__)
        params: dict[str, Any] = {
            name: value if isinstance(value, GivenWeights) else parameter(value)
            for name, value in options.items()
            if value is not None and name not in ("where", "offsets")
        }
        if options.get("offsets") is not None:
            params["offsets"] = offsets_text(offsets_of(options["offsets"]))
        if options.get("crop") is not None:
            params["crop"] = crop_text(crop_of(options["crop"]))
        if where := conditions(options.get("where")):
            params["where"] = where
        if known is OrderOptions and (self._joins or self._how):
            params |= self._all_joins
        return ({} if split is None else {"split": split}) | params | {"revision": self.revision}
