"""A dataset on a server: its fields, splits and statistics, and its batches, read ahead."""

from __future__ import annotations

import math
import operator
import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, TypeVar, Unpack, cast, overload
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from .answers import DatasetInfo, NamedSplits, PlanInfo, SplitsInfo, StatsInfo
from .batch import Batch
from .blocks import Block, Fetch, blocks_from
from .buffers import BufferPool
from .cache import RowCache
from .crops import Crops, RowShape, crop_of, crop_text, crops_of
from .errors import BadAnswer, BadParameter, Preparing, RevisionChanged, RowOutOfRange, TooLarge
from .fetching.cached import MadeOf, Origin, cached_fetch, takes_of
from .fetching.decoding import decoded_batch, decoded_fetch, specs_for
from .fetching.dense import dense_fetch, unpacked, unpacked_fetch
from .fetching.images import ImageFetcher
from .fetching.laying_out import laid_out, laid_out_fetch
from .fetching.parts import PART_BYTES
from .fetching.pieces import check_can_read
from .fetching.provisional import LaterCached
from .fetching.readahead import ReadAhead, read_ahead
from .fetching.server import (
    check_asked_for,
    fetch_by_key,
    fetch_rows,
    fetcher,
    only_batch,
    only_tensor,
    rows_in,
    taker,
)
from .frames import DTYPES, MAX_BODY_BYTES, Field, Frame
from .images import ImageSpec
from .net import jobs
from .net.balancing import ReplicaStats
from .net.client import Client
from .net.concurrency import Link
from .offsets import Offsets, axes_of, has_masks, offsets_by_name, offsets_of, offsets_text, renamed
from .options import (
    OrderOptions,
    SplitOptions,
    split_options,
)
from .order import BatchGrid
from .pictures import PNG, Picture, PlotKind
from .plan import Plan, StoredImages, conditions, names_of, parameter, quoted, tail_of
from .ragged import OPTIONS, Layout, layout_of
from .revisions import is_provisional
from .samples import Samples
from .schema import checked
from .splits import Splits, replaced_told, tell_replaced
from .stats import FieldStats, Stats
from .stored.packing import PACKING, Packing
from .suggestions import check_options, did_you_mean
from .tables import titled_table
from .weights import GivenWeights
from .wire import CROP, OFFSETS, ROWS, Tensor, dtype_named, rows_of_other

CODECS = ("zstd",)
"""Values of ``compress``."""

_MAX_PLANS = 256

_OF_OTHER = "/"
"""Between the names of a joined dataset and of its field: no name of either contains it."""

_NOT_BY_ID = "samples are made of several rows"
_CROPPED = "rows are cropped by the server"
_JOINED = "samples are made of rows of several datasets"
"""See `Plan.not_by_id` and `Plan.not_here`."""

_SETTLE_POLL_SECONDS = 0.5
"""Interval at which the server is asked whether it has hashed the files."""

_BODY_HEAD_BYTES = 1 << 20
"""Maximum header size of a body that is not a batch."""


D = TypeVar("D", bound="RemoteDataset")


class RemoteDataset(Samples):
    """The part of `h5feed.Dataset` that the training loops use; see there for its attributes."""

    fields: dict[str, Field]

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        self._client = client
        self.info = info
        self.name: str = info["name"]
        self._revision: str = info["revision"]
        self.rows: int = info["rows"]
        self.class_names: list[str] | None = info.get("class_names")
        self.fields = {
            field["name"]: Field(
                field["name"],
                field["role"],
                tuple(field["shape"]),
                field["dtype"],
                field["readable"],
                field["reason"],
                field["ragged"],
                tuple(field["class_names"]) if field.get("class_names") else None,
                field["sparse"]["index_dtype"] if field.get("sparse") else None,
            )
            for field in info["fields"]
        }
        self._joins: tuple[tuple[str, dict[str, Any]], ...] = ()
        self._how: str | None = None
        self._caches: dict[tuple[str, int | None, int, str], RowCache] = {}
        self._plans: dict[frozenset[tuple[str, Any]], dict[str, Any]] = {}
        self._path = f"/v1/datasets/{quoted(self.name)}"

    @classmethod
    def opened(cls, client: Client, name: str, revision: str | None = None) -> Self:
        """Open a dataset: see `h5feed.Feed.dataset`."""
        params = None if revision is None else {"revision": revision}
        info = client.json(f"/v1/datasets/{quoted(name)}", params)
        checked(info, DatasetInfo, "dataset")
        return cls(client, info)

    def at(self, revision: str | None = None) -> Self:
        """The dataset as it is now; with `revision`, as it was then: see `h5feed.Feed.dataset`. Joined ones stay."""
        return self.opened(self._client, self.name, revision)._with_joins(self._joins, self._how)

    def __reduce__(self) -> tuple[Any, ...]:
        # Caches and plans stay in this process. Warnings given here are not repeated by the copy.
        server = self._client.names.server_of(self._revision)
        given = None if server is None else (server.name, self.revision)
        told = replaced_told(self.name, self._revision)
        return _unpickled, (type(self), self._client, self.info, told, given, self._joins, self._how)

    def __repr__(self) -> str:
        fields = ", ".join(f"{f.name}: {f.dtype}{list(f.shape)} ({f.role})" for f in self.fields.values())
        return f"<Dataset {self.name!r}, {self.rows} rows, {fields}, revision {self.revision}>"

    def _repr_html_(self) -> str:
        rows = [
            (field.name, field.role, field.dtype, list(field.shape), "ragged" if field.ragged else field.reason or "")
            for field in self.fields.values()
        ]
        classes = "" if self.class_names is None else f", {len(self.class_names):,} classes"
        title = f"Dataset {self.name!r}, {self.rows:,} rows{classes}, revision {self.revision}"
        return titled_table(title, ("field", "role", "dtype", "shape of a row", ""), rows)

    def __len__(self) -> int:
        """Number of rows."""
        return self.rows

    def join(self: D, *others: str, how: Literal["inner"] | None = None) -> D:
        """This dataset with the fields of others, so that a sample has rows of several datasets of the server.

        The field ``f`` of the dataset ``OTHER`` is named ``OTHER/f``. Loops and batches take it like any other field;
        splits, filters, weights and single rows are those of this dataset. The revisions of the others are fixed now.

        Parameters
        ----------
        *others : str
            ``"OTHER"``: the row of the same number. ``"OTHER:key"``: the row with an equal value of the field ``key``,
            which is unique there. ``"OTHER:key=otherkey"``: if the field has another name there. Percent-encode ``:``,
            ``@``, ``=`` and ``%`` in names.
        how : ``"inner"``, optional
            Leave out rows that have no partner. Default: they are an error.

        Raises
        ------
        DatasetNotFound, RevisionChanged, BadParameter
        """
        if how not in (None, "inner"):
            raise BadParameter(f"how={how!r} must be 'inner', which leaves out rows without a partner, or None")
        joins = list(self._joins)
        for text in others:
            whose, colon, by = text.partition(":")
            name, at, revision = whose.partition("@")
            params = {"revision": unquote(revision)} if at else {}
            info = self._client.json(f"/v1/datasets/{quoted(unquote(name))}", params)
            checked(info, DatasetInfo, "dataset")
            other = RemoteDataset(self._client, info)
            joins.append((f"{quoted(other.name)}@{other.settle()}{colon}{by}", other.info))
        return self._with_joins(joins, how or self._how)

    def owner_of(self, field: str) -> tuple[Samples, str]:
        origin, own = self._origin_of(field)
        return next((RemoteDataset(self._client, info) for _, info in self._joins if info["name"] == origin), self), own

    def joined_by(self, options: dict[str, Any]) -> Self:
        others, how = options.pop("join", None), options.pop("how", None)
        if others is None and how is None:
            return self
        return self.join(*([others] if isinstance(others, str) else others or ()), how=how)

    @property
    def join_options(self) -> dict[str, Any]:
        """The options ``join``, with revisions, and ``how`` of the joined datasets; empty if there are none."""
        if not self._joins:
            return {}
        return {"join": [text for text, _ in self._joins]} | ({} if self._how is None else {"how": self._how})

    def _with_joins(self: D, joins: Sequence[tuple[str, dict[str, Any]]], how: str | None) -> D:
        """A dataset with the fields of others.

        Parameters
        ----------
        joins : sequence of (str, dict)
            The value of the parameter ``join`` and the description of each joined dataset.
        """
        if not joins and how is None:
            return self
        joined = type(self)(self._client, self.info)
        joined._joins, joined._how = tuple(joins), how
        for _, info in joins:
            for field in RemoteDataset(self._client, info).fields.values():
                name = f"{info['name']}{_OF_OTHER}{field.name}"
                # There is one label: that of this dataset.
                role = "other" if field.role == "label" else field.role
                joined.fields[name] = replace(field, name=name, role=role)
        return joined

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
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Shape of each field with rows of equal shape, including the row axis."""
        return {field.name: (self.rows, *field.shape) for field in self.fields.values() if not field.ragged}

    @overload
    def __getitem__(self, rows: int) -> dict[str, npt.NDArray[Any]]: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | npt.NDArray[Any]) -> Batch: ...

    def __getitem__(self, rows: int | slice | Sequence[int] | npt.NDArray[Any]) -> Batch | dict[str, npt.NDArray[Any]]:
        """Index rows like a numpy array: ``ds[0:3]`` and ``ds[[5, 1]]`` are a `Batch`, fetched with one request.

        ``ds[5]`` is a single row: a dict of arrays without the row axis; sparse rows become dense. Contains inputs and
        labels; see also `take`.

        Raises
        ------
        RowOutOfRange, TooLarge
        """
        if isinstance(rows, slice):
            return self.take(range(*rows.indices(self.rows)))
        if isinstance(rows, str):
            raise BadParameter(
                f"{rows!r} is not a row index: use ds[0:3] for rows with inputs and labels, or "
                f"ds.take([0, 1, 2], fields=[{rows!r}]) for one field"
            )
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            if wanted.shape != (self.rows,):
                raise BadParameter(f"a mask of shape {list(wanted.shape)} does not match {self.rows} rows")
            wanted = np.flatnonzero(wanted)
        if not wanted.ndim:
            row = operator.index(rows)  # type: ignore[arg-type]
            if not -self.rows <= row < self.rows:
                raise RowOutOfRange(f"row {row} is out of range for {self.rows} rows")
            return {name: array[0] for name, array in self.dense_rows([row % self.rows]).items()}
        return self.take(np.where(wanted < 0, wanted + self.rows, wanted) if wanted.size else wanted)

    def batch(self, index: int, *, split: str = "all", batch_size: int = 32, **options: Unpack[OrderOptions]) -> Batch:
        """Batch `index` of an order."""
        if "join" in options or "how" in options:
            given: dict[str, Any] = dict(options)
            return self.joined_by(given).batch(index, split=split, batch_size=batch_size, **given)
        asked, decoding = self._decoding(options)
        asked, layout = self._laid_out(asked)
        params = self._params(split, asked, OrderOptions, self.batch) | {"batch_size": str(batch_size)}
        frame = self._frame(asked)
        most = frame.max_bytes(batch_size)
        try:
            body = self._client.body(f"{self._path}/batches/{index}", params, max_bytes=most)
        except TooLarge:
            if batch_size == 1:
                raise
            plan, epoch = self.plan(split, batch_size=batch_size, **options), int(options.get("epoch") or 0)
            return self._fetch(plan, None)(Block(epoch, index, index + 1, plan.batch_bytes), threading.Event())[0]
        batch = only_batch(body, frame)
        check_asked_for(batch, index, int(options.get("epoch") or 0), self.revision, self._client.names)
        if rows_in(batch, frame) > batch_size:
            raise BadAnswer(f"batch {index} has {rows_in(batch, frame)} rows, expected at most {batch_size}")
        if decoding:
            batch = decoded_batch(batch, decoding, self._client.pool)
        if unpacking := self._unpacking(options):
            batch = unpacked(batch, unpacking)
        if layout is not None:
            batch = laid_out(batch, layout, self._client.pool)
        return batch.densified(self._client.pool) if options.get("sparse") == "dense" else batch

    def take(
        self,
        rows: Sequence[int] | npt.NDArray[Any] | None = None,
        *,
        fields: Sequence[str] | None = None,
        keys: Sequence[str | int] | npt.NDArray[Any] | None = None,
        key: str | None = None,
        duplicates: Literal["refuse", "all"] = "refuse",
    ) -> Batch:
        """Rows by id or by key, in the given order. Rows that are listed twice are returned twice.

        Parameters
        ----------
        rows : sequence of int, optional
            Row ids.
        fields : sequence of str, optional
            Default: inputs and labels.
        keys : sequence of str or int, optional
            Instead of `rows`: values of the field `key`.
        key : str, optional
            Field of one text or integer per row, such as a file name. The server builds an index of it at the first
            request.
        duplicates : ``"refuse"`` or ``"all"``
            If several rows have a key, raise `AmbiguousKey`, so that the batch has one row for each key; or return all
            of them, one after the other. ``batch.rows`` are their ids.

        Raises
        ------
        RowOutOfRange, KeysNotFound, AmbiguousKey, TooLarge
        """
        if self._joins and fields is None:
            fields = [name for name in self._chosen({}) if _OF_OTHER not in name]
        chosen = {} if fields is None else {"fields": [fields] if isinstance(fields, str) else list(fields)}
        if self._joins and (of_other := next((name for name in chosen["fields"] if _OF_OTHER in name), None)):
            raise BadParameter(f"take returns rows of {self.name!r} alone, not {of_other!r}: see batches()")
        if (rows is None) == (keys is None) or (keys is None) != (key is None):
            raise BadParameter("take needs either row ids, or keys= and key=, the field that they are values of")
        if keys is not None:
            request: dict[str, Any] = {"key": key, "keys": key_list(keys), "duplicates": duplicates, **chosen}
            several = duplicates == "all"
            return fetch_by_key(self._client, self._path, self.revision, request, self._frame(chosen), several=several)
        wanted = row_ids([] if rows is None else rows)
        request = {"rows": wanted.tolist(), **chosen}
        return fetch_rows(self._client, self._path, self.revision, request, wanted, self._frame(request))

    def dense_rows(self, rows: Sequence[int] | npt.NDArray[Any], fields: Sequence[str] | None = None) -> Batch:
        """Same as `take`, with dense arrays instead of sparse rows."""
        return self.take(rows, fields=fields).densified(self._client.pool)

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

    @property
    def _all_joins(self) -> dict[str, Any]:
        """The parameters of joins."""
        return {"join": tuple(text for text, _ in self._joins)} | ({} if self._how is None else {"how": self._how})

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

    def plan(self, split: str = "all", *, batch_size: int = 32, **options: Unpack[OrderOptions]) -> Plan:
        """The rows and batches of an epoch, known before fetching."""
        if "join" in options or "how" in options:
            given: dict[str, Any] = dict(options)
            return self.joined_by(given).plan(split, batch_size=batch_size, **given)
        asked, decoding = self._decoding(options)
        asked, layout = self._laid_out(asked)
        params = self._params(split, asked, OrderOptions, self.plan) | {"batch_size": str(batch_size)}
        # The division into batches depends neither on the order nor on the epoch, and is fixed for a revision.
        cut = frozenset(item for item in params.items() if item[0] not in ("shuffle", "seed", "epoch"))
        answer = self._plans.get(cut)
        if answer is None:
            answer = self._client.json(f"{self._path}/plan", params)
            self._check_plan(checked(answer, PlanInfo, "plan"), self._frame(asked), batch_size, asked)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[cut] = answer
            if answer["replaces"] and params.get("shard", "0") == "0":
                tell_replaced(self.name, self._revision, split_options(options), answer["note"] or "")
        frame = self._frame(asked)
        is_dense, unpacking = options.get("sparse") == "dense", self._unpacking(options)
        is_cropped = asked.get("crop") is not None
        limits, wire_bytes = answer["limits"], max(1, answer["batch_bytes"])
        part_rows = answer.get("part_rows", batch_size)
        if part_rows < batch_size:
            part_rows = max(1, min(part_rows, PART_BYTES * batch_size // wire_bytes))
        return Plan(
            rows=answer["rows"],
            batches=answer["batches"],
            # During decoding, encoded and decoded images are both in memory; so are flat and padded lists.
            batch_bytes=answer["batch_bytes"]
            + sum(batch_size * math.prod(spec.shape) for spec in decoding.values())
            + (0 if layout is None else layout.nbytes(batch_size))
            + (self._dense_bytes(frame) * batch_size if is_dense else 0)
            + batch_size
            * sum(
                math.prod(frame.tensors[name][1]) * np.dtype(packing.dtype).itemsize
                for name, packing in unpacking.items()
            ),
            params=params,
            batch_size=batch_size,
            tensors=tuple(
                self._tensor(**tensor)
                for tensor in answer["tensors"]
                if tensor["name"].removesuffix(OFFSETS) not in decoding
            )
            + tuple(Tensor(name, np.dtype("|u1"), (batch_size, *spec.shape)) for name, spec in decoding.items()),
            max_rows=limits["rows"],
            max_bytes=limits["body_bytes"],
            last_rows=answer["last_rows"],
            frame=frame,
            decoding=decoding,
            dense=is_dense,
            unpacking=unpacking,
            pieces={"server": False, "client": True}.get(options.get("decode") or "auto"),
            compress=options.get("compress"),
            images=self._stored_images(asked) if options.get("decode") in (None, "auto") else {},
            rows_per_sample=max([1, *(math.prod(axes_of(own)) for own in self._offsets(asked).values())]),
            not_by_id=self._not_by_id(asked),
            not_here=_CROPPED if is_cropped else "",
            stored=answer["stored"],
            part_rows=part_rows if part_rows < batch_size else 0,
            chunk_rows=max(1, answer.get("rows_decoded_together", 1)),
            note=answer["note"],
            asked=dict(options),
            layout=layout,
            fill=packed["fill"] if (packed := answer.get("packed")) else None,
            bucket_rows=answer.get("bucket_rows"),
        )

    def _not_by_id(self, asked: Mapping[str, Any]) -> str:
        """See `Plan.not_by_id`."""
        if asked.get("crop") is not None:
            return _CROPPED
        if self._offsets(asked) or renamed(asked):
            return _NOT_BY_ID
        return _JOINED if self._joins else ""

    def fetch_of(
        self, plan: Plan, cache: str | os.PathLike[str] | RowCache | None = None, pool: BufferPool | None = None
    ) -> tuple[Fetch[Batch], float]:
        """The function that fetches blocks of a plan, and the maximum number of seconds that a block may take.

        Through a local cache, if one is given. The memory of the batches is that of `pool`; default: that of the
        client.
        """
        # Row ids, and rows of each server.
        placed = 0 if self._client.placement is None else 1 + len(self._client.replicas)
        # A fetch may send two requests: the stream, and the batch at which it broke, or one for each part of a batch.
        # With a cache, also requests for row ids, for missing rows and for fields that are not cached. Images that are
        # not decoded here are requested twice.
        requests = (1 if cache is None else 3) * plan.parts + 1 + bool(plan.images) + placed
        requests += 0 if cache is None else takes_of(plan, self._made_of(plan))
        return self._fetch(plan, cache, pool), requests * self._client.deadline

    @property
    def pool(self) -> BufferPool:
        """The memory of the batches."""
        return self._client.pool

    @property
    def link(self) -> Link:
        """What streams have learnt about the link to the servers."""
        return self._client.link

    def read_passes(
        self,
        plan: Plan,
        epoch: int,
        start: int,
        stop: int | None = None,
        *,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | RowCache | None = None,
        waits: Callable[[], str | None] = lambda: None,
        pool: BufferPool | None = None,
    ) -> ReadAhead[Batch]:
        fetch, seconds = self.fetch_of(plan, cache, pool)
        return read_ahead(
            fetch, blocks_from(plan, epoch, start, stop), seconds, connections, readahead, self.link, waits
        )

    def cache(self, folder: str | os.PathLike[str], cache_bytes: int | None = None) -> RowCache:
        """A local cache folder for this dataset, to pass as ``cache=`` or to inspect.

        If the revision is provisional, this waits until the server has hashed the files.

        Parameters
        ----------
        folder : path
            Created if missing. May be shared by all datasets and processes of a machine.
        cache_bytes : int, optional
            Maximum size of the whole folder; default: the free disk space, minus a tenth of the disk.

        Raises
        ------
        Preparing
        """
        return self._cache_of(self.name, self.settle(), self.rows, folder, cache_bytes)

    def _cache_of(
        self, name: str, revision: str, rows: int, folder: str | os.PathLike[str], cache_bytes: int | None
    ) -> RowCache:
        """The cache of a dataset in a folder."""
        # One per process: a lock may have been held at the time of the fork.
        key = os.path.abspath(os.path.expanduser(folder)), cache_bytes, os.getpid(), name
        found = self._caches.get(key)
        if found is None:
            found = self._caches[key] = RowCache(key[0], name, revision, rows, cache_bytes)
        return found

    def named_weights(self, weights: str | npt.ArrayLike) -> str:
        return weights if isinstance(weights, str) else GivenWeights.of(weights, self.rows, f"{self._path}/weights")

    def _fetch(
        self, plan: Plan, cache: str | os.PathLike[str] | RowCache | None, pool: BufferPool | None = None
    ) -> Fetch[Batch]:
        """The function that fetches blocks. It does not refer to the `Dataset`: threads must not keep it alive."""
        client = self._client if pool is None else self._client.with_pool(pool)
        if plan.layout is not None:
            flat = self._fetch(replace(plan, layout=None), cache, pool)
            return laid_out_fetch(flat, plan.layout, client.pool)
        path = self._path
        images = ImageFetcher(client, path, plan) if plan.images else None
        fetch: Fetch[Batch] = images or fetcher(client, path, plan)
        if plan.decoding:
            fetch = decoded_fetch(fetch, plan.decoding, client.pool)
        found = fetch if cache is None else self._cached(fetch, images, plan, cache, client)
        if plan.unpacking:
            found = unpacked_fetch(found, plan.unpacking)
        return dense_fetch(found, client.pool) if plan.dense and plan.frame.sparse else found

    def _cached(
        self,
        fetch: Fetch[Batch],
        images: ImageFetcher | None,
        plan: Plan,
        cache: str | os.PathLike[str] | RowCache,
        client: Client,
    ) -> Fetch[Batch]:
        """Fetch blocks through a local cache."""
        client_of = partial(fetcher, client, self._path)
        made_of, uncropped = self._made_of(plan), _without_crops(plan)
        take = partial(
            taker,
            client,
            self._path,
            frame=self._frame_of_rows(plan),
            decoding=plan.decoding,
            as_stored=names_of(plan.params.get("encoded")),
        )
        others = self._other_origins(plan, made_of, cache, client)

        def cached(own: RowCache, revision: str) -> Fetch[Batch]:
            take_own = images.taker(revision) if images else take(revision=revision, pool=client.pool)
            return cached_fetch(
                fetch,
                plan,
                {"": Origin(own, take_own), **others},
                made_of,
                fetch_ids=client_of(plan.of_row_ids()),
                fetch_fields=lambda names: client_of(uncropped.of_fields(names)),
                pool=client.pool,
            )

        if is_provisional(self.revision):
            name, rows, given = self.name, self.rows, cache

            def cached_later(content: str) -> Fetch[Batch]:
                own = given if isinstance(given, RowCache) else RowCache(given, name, content, rows)
                own.check(name, content)
                if own.pid != os.getpid():
                    own = RowCache(own.folder, name, content, rows, own.max_bytes)
                return cached(own, content)

            return LaterCached(fetch, cached_later, client.names, self._revision, name)
        if isinstance(cache, RowCache):
            cache.check(self.name, self.revision)
            if cache.pid != os.getpid():
                cache = self.cache(cache.folder, cache.max_bytes)
        else:
            cache = self.cache(cache)
        return cached(cache, self.revision)

    def _made_of(self, plan: Plan) -> dict[str, MadeOf]:
        """What the fields of samples are made of, but for sparse ones.

        Raises
        ------
        BadParameter
            A row is too long to be fetched as a whole, or the server does not tell the rows of a joined dataset.
        """
        names = _fields_of(plan)
        asked = {**plan.asked, "fields": names}
        known, stored, offsets, crops = self._known(asked), renamed(asked), self._offsets(asked), self.crops(asked)
        by_key = [info["name"] for text, info in self._joins if ":" in text]
        found = {}
        for name in names:
            if name in plan.frame.sparse:
                continue
            is_list = name in plan.frame.flat and name not in plan.decoding
            is_cropped = crops is not None and name in crops.fields
            origin, field = self._origin_of(stored.get(name, name))
            if offsets.get(name, 0) != 0 and origin in by_key:
                raise BadParameter(
                    f"cache= cannot be used here: {name!r} has several rows of {origin!r}, which is joined by key, and "
                    "the server tells only the partner of the sample's own row. Leave out cache=, or give this field "
                    "the offset 0"
                )
            found[name] = MadeOf(
                origin,
                field,
                None if is_list else known[name].shape,
                offsets.get(name, 0),
                crops.lengths if crops is not None and is_cropped else None,
            )
            row_bytes = math.prod(known[name].shape) * plan.frame.tensors[name][0].itemsize
            if is_cropped and row_bytes > plan.max_bytes:
                raise BadParameter(
                    f"cache= keeps whole rows, of which parts are cropped, but a row of {name!r} has {row_bytes:,} "
                    f"bytes, and a response may have {plan.max_bytes:,}: leave out cache=, or start the server with a "
                    "larger H5FEED_MAX_BODY_BYTES"
                )
        return found

    def _origin_of(self, field: str) -> tuple[str, str]:
        """The joined dataset that a field is of, and its name there; "" if it is of this dataset."""
        for _, info in self._joins:
            if field.startswith(f"{info['name']}{_OF_OTHER}"):
                return info["name"], field.removeprefix(f"{info['name']}{_OF_OTHER}")
        return "", field

    def _other_origins(
        self,
        plan: Plan,
        made_of: Mapping[str, MadeOf],
        cache: str | os.PathLike[str] | RowCache,
        client: Client,
    ) -> dict[str, Origin]:
        """The joined datasets, with a cache of their own in the same folder."""
        found = {}
        folder, cache_bytes = (cache.folder, cache.max_bytes) if isinstance(cache, RowCache) else (cache, None)
        for text, info in self._joins:
            whose, by_key, _ = text.partition(":")
            other, revision = RemoteDataset(self._client, info), unquote(whose.partition("@")[2])
            fields = [made.field for made in made_of.values() if made.origin == other.name]
            if fields:
                encoded = [self._origin_of(name) for name in names_of(plan.params.get("encoded"))]
                as_stored = [field for origin, field in encoded if origin == other.name]
                frame = other._frame({"fields": fields, "encoded": as_stored})
                found[other.name] = Origin(
                    self._cache_of(other.name, revision, other.rows, folder, cache_bytes),
                    taker(client, other._path, revision, frame, {}, client.pool, as_stored=as_stored),
                    rows_of_other(other.name) if by_key else ROWS,
                )
        return found

    def _frame_of_rows(self, plan: Plan) -> Frame:
        """The tensors of single rows of this dataset, of which the samples of a plan are made."""
        stored = renamed(plan.asked)
        own = dict.fromkeys(stored.get(name, name) for name in _fields_of(plan))
        return self._frame({"fields": list(own), "encoded": plan.params.get("encoded")})

    def _decoding(self, options: OrderOptions) -> tuple[OrderOptions, dict[str, ImageSpec]]:
        """Options for the server, and the fields to decode here.

        Raises
        ------
        ModuleNotFoundError, BadParameter
        """
        asked = options.copy()
        asked.pop("decode_cf", None)
        sparse = asked.pop("sparse", None)
        if sparse not in (None, "dense", "csr"):
            raise BadParameter(f"sparse={sparse!r} must be 'dense' or 'csr'")
        if (weights := asked.get("weights")) is not None:
            asked["weights"] = self.named_weights(weights)
        where = asked.pop("decode", None)
        if where not in (None, "auto", "server", "client"):
            raise BadParameter(f"decode={where!r} must be 'auto', 'server' or 'client'")
        compress = asked.pop("compress", None)
        if compress is not None and compress not in CODECS:
            raise BadParameter(f"compress={compress!r} is not known: {did_you_mean(str(compress), CODECS)}")
        if compress is not None and where == "server":
            raise BadParameter(
                f"compress={compress!r} needs decode='auto' or 'client': the client decompresses the rows"
            )
        if compress is not None:
            check_can_read(f"compress={compress!r}")
        if where == "client":
            check_can_read("decode='client'")
        if where != "client":
            return asked, {}
        as_stored = names_of(asked.get("encoded"))
        images = {field["name"]: field["decode"] for field in self.info["fields"] if field.get("decode")}
        crops = self.crops(asked)
        by_server = {*as_stored, *self._offsets(asked), *(() if crops is None else crops.fields)}
        fields = [name for name in self._chosen(asked) if name in images and name not in by_server]
        specs = specs_for({name: images[name] for name in fields})
        for name, spec in specs.items():
            if (spec.shape, "uint8") != (self.fields[name].shape, self.fields[name].dtype):
                raise BadAnswer(
                    f"the server decodes images of {name!r} to {list(spec.shape)}, which is not the shape of a row"
                )
        if specs:
            asked["encoded"] = [*as_stored, *specs]
        return asked, specs

    def _laid_out(self, options: OrderOptions) -> tuple[OrderOptions, Layout | None]:
        """Options for the server, and how to pad or pack here what it sends.

        Raises
        ------
        BadParameter, FieldNotFound, UnsupportedField
        """
        fields = None if options.get("fields") is None else names_of(options.get("fields"))
        layout = layout_of(self.fields, fields, options)
        asked: dict[str, Any] = {name: value for name, value in options.items() if name not in OPTIONS}
        if layout is not None:
            asked |= layout.params
            if fields is None:
                others = [] if layout.pack is not None else self._chosen(options)
                asked["fields"] = list(dict.fromkeys([*others, *layout.fields]))
        elif self._joins and fields is None:
            asked["fields"] = self._chosen(options)
        return cast(OrderOptions, asked), layout

    def _described(self) -> dict[str, dict[str, Any]]:
        """The server's descriptions of all fields by name, also of joined datasets."""
        found = {field["name"]: field for field in self.info["fields"]}
        for _, info in self._joins:
            found |= {f"{info['name']}{_OF_OTHER}{field['name']}": field for field in info["fields"]}
        return found

    def _unpacking(self, options: OrderOptions) -> dict[str, Packing]:
        """How to unpack the requested fields, with ``decode_cf``.

        Raises
        ------
        BadParameter
            The pieces of a field are packed in several ways, or its attributes have no meaning; or no field is packed.
        """
        if not options.get("decode_cf"):
            return {}
        found: dict[str, Packing] = {}
        for name, packed in self.packed_fields(self._chosen(options), options).items():
            problem = next((one["problem"] for one in packed if one.get("problem")), None)
            if problem is not None:
                raise BadParameter(
                    f"decode_cf: {name!r} cannot be unpacked: {problem}. Read it as it is stored, without decode_cf"
                )
            if len(packed) > 1:
                raise BadParameter(
                    f"decode_cf: the pieces of {name!r} are packed in {len(packed)} ways: let the server unpack them, "
                    'with apply = "scale" in h5feed.toml'
                )
            (one,) = packed
            found[name] = Packing(
                one["dtype"], one["scale_factor"], one["add_offset"], tuple(one["missing"]), one["unsigned"]
            )
        if not found:
            raise BadParameter(
                f"decode_cf: none of the fields {self._chosen(options)} of {self.name!r} has attributes that say how "
                f"to unpack it ({', '.join(PACKING)}), or the server unpacks it already: leave out decode_cf"
            )
        return found

    def packed_fields(self, names: Iterable[str], options: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """Those of the fields that are packed by the CF conventions, and how: see `PackedInfo`."""
        described, stored = self._described(), renamed(options)
        ways = {name: described.get(stored.get(name, name), {}).get("cf") for name in names}
        return {name: packed for name, packed in ways.items() if packed}

    def _dense_bytes(self, frame: Frame) -> int:
        """Bytes of a row of all sparse fields as dense arrays."""
        return sum(columns * DTYPES[self.fields[name].dtype].itemsize for name, columns in frame.sparse.items())

    def _stored_images(self, asked: Mapping[str, Any]) -> dict[str, StoredImages]:
        """The requested fields that the server decodes from image files, and the client may decode instead."""
        if self._offsets(asked) or asked.get("crop") is not None:
            return {}
        as_stored, chosen = names_of(asked.get("encoded")), set(self._chosen(asked))
        return {
            name: StoredImages(
                field["decode"],
                field.get("image_libraries"),
                field.get("image_bytes"),
                self.rows * math.prod(self.fields[name].shape),
            )
            for field in self.info["fields"]
            if field.get("decode") and (name := field["name"]) in chosen and name not in as_stored
        }

    def _chosen(self, asked: Mapping[str, Any]) -> list[str]:
        """Names of the requested fields."""
        if asked.get("fields") is not None:
            return names_of(asked["fields"])
        of_roles = {*self.fields_of_role("input"), *self.fields_of_role("label")}
        # In the order of the server, which is that of all fields.
        found = [name for name in self.fields if name in of_roles]
        found = found or [field.name for field in self.fields.values() if field.readable and not field.ragged]
        return [*found, *renamed(asked)]

    def _frame(self, asked: Mapping[str, Any]) -> Frame:
        """The expected tensors of a response. Unknown fields are left to the server to reject."""
        known = self._known(asked)
        fields = [known[name] for name in self._chosen(asked) if name in known]
        crops = self.crops(asked)
        if crops is not None:
            fields = [replace(field, shape=crops.shape(field.name, field.shape)) for field in fields]
        return Frame.of(
            self.rows,
            fields,
            names_of(asked.get("encoded")),
            weighted=tail_of(asked) == "pad",
            offsets=self._offsets(asked),
            masked=has_masks(asked),
            cropped_axes=0 if crops is None else len(crops.lengths),
            packed=asked.get("pack") is not None,
        )

    def _known(self, asked: Mapping[str, Any]) -> dict[str, Field]:
        """All fields that batches may have, by the names that they have there."""
        known = dict(self.fields)
        for name, field in renamed(asked).items():
            if field in known:
                known.setdefault(name, replace(known[field], name=name))
        return known

    def _offsets(self, asked: Mapping[str, Any]) -> dict[str, Offsets]:
        """Offsets of the requested fields whose rows are not the samples' own, by name."""
        return offsets_by_name(asked, self._chosen(asked))

    def crops(self, asked: Mapping[str, Any]) -> Crops | None:
        """Which fields of an order are cropped, and how; None if nothing is.

        Raises
        ------
        FieldNotFound, BadParameter
        """
        if asked.get("crop") is None:
            return None
        as_stored, known, stored = names_of(asked.get("encoded")), self._known(asked), renamed(asked)
        described = self._described()
        rows = {
            name: RowShape(
                known[name].shape, 0 if name in as_stored else described[stored.get(name, name)].get("spatial_axes", 0)
            )
            for name in self._chosen(asked)
            if name in known
        }
        return crops_of(asked, rows)

    def _check_plan(self, plan: PlanInfo, frame: Frame, batch_size: int, asked: Mapping[str, Any]) -> None:
        """Raise `BadAnswer` if a plan does not match the dataset or contradicts itself."""
        self._of_this_revision(plan)
        grid = BatchGrid(plan["rows"], batch_size, asked.get("shard") or 0, asked.get("shards") or 1, plan["last"])
        last_rows = grid.size(grid.batches - 1) if grid.batches else 0
        draws = any(asked.get(option) for option in ("balance", "weights", "epoch_rows"))
        crops = self.crops(asked)
        most = self.rows * (1 if crops is None else crops.samples_of_row)
        if (
            (plan["batches"], plan["last_rows"], plan["last"]) != (grid.batches, last_rows, tail_of(asked))
            or (plan["rows"] > most and not draws and not frame.packed)
            or not plan["limits"]["body_bytes"]
        ):
            raise BadAnswer(
                f"the server's plan does not match {self.rows:,} rows in batches of {batch_size}: {plan!r:.500}"
            )
        frame.check_plan((self._tensor(**tensor) for tensor in plan["tensors"]), batch_size)

    def _of_this_revision(self, answer: Any) -> Any:
        if not self._client.names.are_same(answer["revision"], self.revision):
            raise BadAnswer(
                f"requested revision {self.revision} of {self.name!r}, but received {answer['revision']}: a proxy or "
                "cache between client and server mixes up responses"
            )
        return answer

    def _tensor(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        if dtype == "bfloat16":
            return Tensor(name, dtype_named("BF16"), tuple(shape), is_bfloat16=True)
        if dtype not in DTYPES:
            raise BadAnswer(f"the server sent an unknown dtype {dtype!r} for {name!r}")
        return Tensor(name, DTYPES[dtype], tuple(shape))

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


def _fields_of(plan: Plan) -> list[str]:
    """Names of the fields of samples, without what comes with them."""
    beside = {CROP, ROWS + OFFSETS} | plan.frame.masks
    return [name for name in plan.frame.fields if name not in beside]


def _without_crops(plan: Plan) -> Plan:
    """The plan for fields that are neither cached nor cropped.

    Raises
    ------
    BadParameter
    """
    if CROP not in plan.frame.tensors:
        return plan
    if plan.params.get("crop_at") == "grid" and plan.frame.sparse:
        raise BadParameter(
            f"cache= keeps no sparse rows, as of {next(iter(plan.frame.sparse))!r}, and a grid of crops needs them for "
            "each cell: leave out this field, or cache="
        )
    params = {name: value for name, value in plan.params.items() if name not in ("crop", "crop_fields", "crop_at")}
    tensors = {name: kind for name, kind in plan.frame.tensors.items() if name != CROP}
    return replace(plan, params=params, frame=replace(plan.frame, tensors=tensors))


def key_list(keys: Sequence[str | int] | npt.NDArray[Any]) -> list[str | int]:
    """Keys as they are sent.

    Raises
    ------
    BadParameter
    """
    if isinstance(keys, str):
        raise BadParameter(f"keys={keys!r} is a single key: pass a list of keys")
    listed: list[Any] = list(keys.tolist() if isinstance(keys, np.ndarray) else keys)
    found: list[str | int] = []
    for one in listed:
        if isinstance(one, bytes):
            try:
                one = one.decode()
            except UnicodeDecodeError:
                raise BadParameter(f"keys are text in UTF-8, which {one!r:.100} is not") from None
        if isinstance(one, (bool, np.bool_)) or not isinstance(one, (str, int, np.integer)):
            raise BadParameter(f"keys must be text or integers, not {one!r:.100}")
        found.append(one if isinstance(one, str) else int(one))
    return found


def row_ids(rows: npt.ArrayLike) -> npt.NDArray[Any]:
    """Row ids as an array of integers.

    Raises
    ------
    BadParameter
    """
    wanted = np.asarray(rows)
    if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
        raise BadParameter(f"rows must be a flat list of integers, got {wanted.dtype} of shape {wanted.shape}")
    return wanted


def _unpickled(
    kind: type[D],
    client: Client,
    info: dict[str, Any],
    told: frozenset[str],
    given: tuple[str, str] | None = None,
    joins: tuple[tuple[str, dict[str, Any]], ...] = (),
    how: str | None = None,
) -> D:
    dataset = kind(client, info)._with_joins(joins, how)
    replaced_told(dataset.name, info["revision"], told)
    if given is not None:
        url, current = given
        client.adopt_name(info["revision"], url, None if is_provisional(current) else current)
    return dataset
