"""A dataset on a server, by requests: its fields, splits and statistics, and its batches, read ahead."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn, TypeVar, Unpack, overload
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from .answers import NamedSplits, PlanInfo, SplitsInfo, StatsInfo
from .batch import Batch
from .blocks import Block, Fetch, blocks_of, blocks_of_passes
from .cache import RowCache
from .errors import BadAnswer, BadParameter, RowOutOfRange
from .fetching.cached import cached_fetch
from .fetching.decoding import decoded_batch, decoded_fetch, specs_for
from .fetching.readahead import ReadAhead
from .fetching.server import check_asked_for, fetch_rows, fetcher, only_batch, only_tensor, taker
from .frames import DTYPES, MAX_BODY_BYTES, Field, Frame
from .images import ImageSpec
from .net import jobs
from .net.client import Client
from .net.pace import Pace
from .options import (
    OrderOptions,
    SplitOptions,
    split_options,
)
from .order import BatchGrid
from .plan import Plan, names_of, parameter, tail_of
from .schema import checked
from .splits import Splits, replaced_told, tell_replaced
from .stats import FieldStats, Stats
from .suggestions import check_options
from .tables import titled_table
from .wire import OFFSETS, ROWS, Tensor, dtype_named

BLOCK_BYTES = 8 << 20
"""Bytes: small batches are asked for together up to this much; one request a batch would be many times slower."""

DEFAULT_CONNECTIONS: int | None = None
"""Requests in flight at most; None: as many as the link needs, up to `pace.MAX_WIDTH`."""

DEFAULT_READAHEAD = 64 << 20
"""Bytes fetched ahead of the training loop at most."""

_MAX_PLANS = 256

_BODY_HEAD_BYTES = 1 << 20
"""What the header of a body may have that is no batch."""


D = TypeVar("D", bound="RemoteDataset")


class RemoteDataset:
    """What a `Dataset` is to the loops that read it.

    It is as it was when asked for: every request names its revision, so that data which changed meanwhile is an error
    (`RevisionChanged`), never a mixture.

    Attributes
    ----------
    name, revision : str
    rows : int
    fields : dict of str to Field
    class_names : list of str or None
        Of the first label field; each field has its own, too.
    info : dict
        All that the server says of the dataset.
    """

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        self._client = client
        self.info = info
        self.name: str = info["name"]
        self.revision: str = info["revision"]
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
            )
            for field in info["fields"]
        }
        self._caches: dict[tuple[str, int | None, int], RowCache] = {}
        self._plans: dict[frozenset[tuple[str, str]], dict[str, Any]] = {}
        self._path = f"/v1/datasets/{quote(self.name, safe='')}"

    def __reduce__(self) -> tuple[Any, ...]:
        # Caches and plans are of this process; what was told once is not told again by the next.
        return _unpickled, (type(self), self._client, self.info, replaced_told(self.name, self.revision))

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
        """Rows."""
        return self.rows

    def __bool__(self) -> bool:
        # One without rows is a dataset too.
        return True

    @property
    def shape(self) -> dict[str, tuple[int, ...]]:
        """Shape of each field whose rows are arrays of one shape, the rows first."""
        return {field.name: (self.rows, *field.shape) for field in self.fields.values() if not field.ragged}

    @overload
    def __getitem__(self, rows: int) -> dict[str, npt.NDArray[Any]]: ...

    @overload
    def __getitem__(self, rows: slice | Sequence[int] | npt.NDArray[Any]) -> Batch: ...

    def __getitem__(self, rows: int | slice | Sequence[int] | npt.NDArray[Any]) -> Batch | dict[str, npt.NDArray[Any]]:
        """Rows by their place, as of a numpy array: ``ds[0:3]`` and ``ds[[5, 1]]`` are a `Batch`, by one request.

        ``ds[5]`` is one row: the arrays of its fields, without the row axis. Inputs and labels come; `take` has others.

        Raises
        ------
        RowOutOfRange, TooLarge
        """
        if isinstance(rows, slice):
            return self.take(range(*rows.indices(self.rows)))
        if isinstance(rows, str):
            raise BadParameter(
                f"{rows!r} is no row: ds[0:3] are rows with their inputs and labels, and "
                f"ds.take([0, 1, 2], fields=[{rows!r}]) those of one field"
            )
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            if wanted.shape != (self.rows,):
                raise BadParameter(f"a mask of shape {list(wanted.shape)} does not fit {self.rows} rows")
            wanted = np.flatnonzero(wanted)
        if not wanted.ndim:
            row = operator.index(rows)  # type: ignore[arg-type]
            if not -self.rows <= row < self.rows:
                raise RowOutOfRange(f"row {row} does not exist: there are {self.rows}")
            return {name: array[0] for name, array in self.take([row % self.rows]).items()}
        return self.take(np.where(wanted < 0, wanted + self.rows, wanted) if wanted.size else wanted)

    def __iter__(self) -> NoReturn:
        # Python would ask for one row after the other, each by a request.
        raise TypeError("a Dataset is read by batches: loop over ds.batches() or ds.loader(), or look at ds[0:3]")

    def fields_of_role(self, role: str) -> list[str]:
        """Names of the readable fields of a role whose rows are arrays of one shape."""
        found = [field for field in self.fields.values() if field.role == role and field.readable]
        return [field.name for field in found if not field.ragged]

    def batch(self, index: int, *, split: str = "all", batch_size: int = 32, **options: Unpack[OrderOptions]) -> Batch:
        """Batch `index` of an order."""
        asked, decoding = self._decoding(options)
        params = self._params(split, asked, OrderOptions, self.batch) | {"batch_size": str(batch_size)}
        frame = self._frame(asked)
        most = frame.max_bytes(batch_size)
        batch = only_batch(self._client.body(f"{self._path}/batches/{index}", params, max_bytes=most), frame)
        check_asked_for(batch, index, int(options.get("epoch") or 0), self.revision)
        if len(batch.rows) > batch_size:
            raise BadAnswer(f"batch {index} came with {len(batch.rows)} rows where {batch_size} at most were asked for")
        return decoded_batch(batch, decoding, self._client.pool) if decoding else batch

    def batches(
        self,
        split: str = "all",
        *,
        batch_size: int = 32,
        connections: int | None = DEFAULT_CONNECTIONS,
        readahead: int = DEFAULT_READAHEAD,
        cache: str | os.PathLike[str] | RowCache | None = None,
        **options: Unpack[OrderOptions],
    ) -> ReadAhead[Batch]:
        """All batches of one epoch, in order, fetched ahead.

        Parameters
        ----------
        connections : int, optional
            Requests in flight at most. Default: as many as the link needs, which is found out while running.
        readahead : int
            Bytes fetched ahead at most.
        cache : path or RowCache, optional
            A local folder that keeps what has been fetched: see `cache`.

        Returns
        -------
        iterator of Batch
            With ``waited`` (seconds spent waiting for data) and ``close()``.
        """
        check_options(options, self.batches, OrderOptions.__annotations__)
        plan = self.plan(split, batch_size=batch_size, **options)
        epoch = options.get("epoch", 0)
        return self.read_ahead(
            plan, blocks_of(epoch, plan.batches, plan.batch_bytes, BLOCK_BYTES), connections, readahead, cache
        )

    def take(self, rows: Sequence[int] | npt.NDArray[Any], *, fields: Sequence[str] | None = None) -> Batch:
        """Those rows, in the order asked, duplicates kept."""
        wanted = np.asarray(rows)
        if wanted.ndim != 1 or (wanted.size and wanted.dtype.kind not in "iu"):
            raise BadParameter(f"rows must be a flat list of ints, not {wanted.dtype} of shape {wanted.shape}")
        request: dict[str, Any] = {"rows": wanted.tolist()}
        if fields is not None:
            request["fields"] = [fields] if isinstance(fields, str) else list(fields)
        return fetch_rows(self._client, self._path, self.revision, request, wanted, self._frame(request))

    def splits(
        self,
        *,
        classes: str | None = None,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> Splits:
        """Rows, rows and share per class, class weights and digest of each split; a table when printed.

        The server divides the rows once for a revision.

        Parameters
        ----------
        classes : str, optional
            Field whose classes are counted; default: the one that rows are stratified by, or the label.
        timeout : float
            Seconds to wait for a server that has to read labels and divide rows first.
        progress : callable, optional
            Called meanwhile with the rows read and divided so far, and of all: a row counts once for each field that is
            read and once for each time that rows are divided.

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
        """Mean, standard deviation, histogram, classes … of the rows of one split, and of no others.

        The server computes them once for a revision.

        Parameters
        ----------
        field : str, optional
            One field; default: all, by name.
        timeout : float
            Seconds to wait for a server that has to read the data first.
        progress : callable, optional
            Called meanwhile with the bytes read so far, and of all.

        Raises
        ------
        ReadTimeout
        """
        params = self._params(split, options, SplitOptions, self.stats) | ({} if field is None else {"field": field})
        ask = partial(self._client.json, f"{self._path}/stats", params, is_job=True)
        answer = checked(jobs.wait_for(ask, "statistics", timeout, progress), StatsInfo, "statistics")
        found = Stats(self._of_this_revision(answer))
        if answer["replaces"]:
            tell_replaced(self.name, self.revision, split_options(options), answer["note"] or "")
        if field is None:
            return found
        if field not in found:
            raise BadAnswer(f"statistics of {field!r} were asked for, but the server's are of {', '.join(found)}")
        return found[field]

    def mean_image(self, field: str, split: str = "all", **options: Unpack[SplitOptions]) -> npt.NDArray[np.float32]:
        """The mean of a field's images over the rows of a split, and of no others, (*sample,) float32."""
        params = self._params(split, options, SplitOptions, self.mean_image) | {"field": field}
        shape = self.fields[field].shape if field in self.fields else ()
        most = min(_BODY_HEAD_BYTES + 4 * math.prod(shape), MAX_BODY_BYTES)
        ask = partial(self._client.body, f"{self._path}/stats/mean-image", params, max_bytes=most, is_job=True)
        body = jobs.wait_for(ask, "statistics", jobs.TIMEOUT, None)
        image, _ = only_tensor(body, "mean_image", "float32", self.revision)
        if image.shape != shape:
            raise BadAnswer(f"a mean image of shape {list(image.shape)} came, but samples are of shape {list(shape)}")
        return image

    def split_rows(
        self,
        split: str,
        *,
        timeout: float = jobs.TIMEOUT,
        progress: jobs.Progress | None = None,
        **options: Unpack[SplitOptions],
    ) -> npt.NDArray[np.int64]:
        """Row ids of a split, ascending, (rows,) int64; `timeout` and `progress` as those of `splits`."""
        params = self._params(None, options, SplitOptions, self.split_rows)
        most = min(_BODY_HEAD_BYTES + 8 * self.rows, MAX_BODY_BYTES)
        path = f"{self._path}/splits/{quote(split, safe='')}/rows"
        ask = partial(self._client.body, path, params, max_bytes=most, is_job=True)
        body = jobs.wait_for(ask, "rows of the split", timeout, progress)
        rows, about = only_tensor(body, ROWS, "int64", self.revision)
        if rows.ndim != 1 or (rows.size and (rows[0] < 0 or rows[-1] >= self.rows or (np.diff(rows) <= 0).any())):
            raise BadAnswer(f"the row ids of {split!r} are not ascending ones of {self.rows:,} rows")
        if "replaced" in about:
            tell_replaced(self.name, self.revision, split_options(options), about["replaced"])
        return rows

    def plan(self, split: str = "all", *, batch_size: int = 32, **options: Unpack[OrderOptions]) -> Plan:
        """What an epoch of this order will be."""
        asked, decoding = self._decoding(options)
        params = self._params(split, asked, OrderOptions, self.plan) | {"batch_size": str(batch_size)}
        # How an order is cut into batches does not depend on the order, and cannot change within a revision.
        cut = frozenset(item for item in params.items() if item[0] not in ("shuffle", "seed", "epoch"))
        answer = self._plans.get(cut)
        if answer is None:
            answer = self._client.json(f"{self._path}/plan", params)
            self._check_plan(checked(answer, PlanInfo, "plan"), self._frame(asked), batch_size, asked)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[cut] = answer
            if answer["replaces"] and params.get("shard", "0") == "0":
                tell_replaced(self.name, self.revision, split_options(options), answer["note"] or "")
        limits = answer["limits"]
        return Plan(
            rows=answer["rows"],
            batches=answer["batches"],
            # While they are decoded, both are in memory.
            batch_bytes=answer["batch_bytes"] + sum(batch_size * math.prod(spec.shape) for spec in decoding.values()),
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
            frame=self._frame(asked),
            decoding=decoding,
            stored=answer["stored"],
            note=answer["note"],
        )

    def read_ahead(
        self,
        plan: Plan,
        blocks: Iterator[Block],
        connections: int | None,
        readahead: int,
        cache: str | os.PathLike[str] | RowCache | None = None,
    ) -> ReadAhead[Batch]:
        """Iterate over `blocks` of a plan, fetched ahead, through a local cache where one is given."""
        if (connections is not None and connections < 1) or readahead < 1:
            raise BadParameter(f"connections={connections} and readahead={readahead} must be 1 or more")
        return ReadAhead(
            self._fetch(plan, cache),
            blocks,
            max_bytes=readahead,
            pace=Pace(readahead, connections, self._client.link),
            # A fetch may ask once for the stream and once more for the batch that broke it; through a cache, once more
            # for row ids, for rows and for what is not kept.
            deadline=(2 if cache is None else 5) * self._client.deadline + 10,
        )

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
    ) -> ReadAhead[Batch]:
        """Iterate over pass `epoch` of a plan from batch `start` to `stop`, or else on into all that follow."""
        if stop is None:
            blocks = blocks_of_passes(plan, epoch, start, BLOCK_BYTES)
        else:
            blocks = blocks_of(epoch, stop, plan.batch_bytes, BLOCK_BYTES, start)
        return self.read_ahead(plan, blocks, connections, DEFAULT_READAHEAD if readahead is None else readahead, cache)

    def cache(self, folder: str | os.PathLike[str], cache_bytes: int | None = None) -> RowCache:
        """The rows of this dataset that a local folder holds, to be given as ``cache=`` or to be looked at.

        Parameters
        ----------
        folder : path
            Of any datasets, for all processes of this machine; made where it is missing.
        cache_bytes : int, optional
            Bound on the whole folder; default: what the disk has, less a tenth of it that is left to others.
        """
        # A fork gets one of its own: it may have come into being while a lock of this one was held.
        key = os.path.abspath(os.path.expanduser(folder)), cache_bytes, os.getpid()
        found = self._caches.get(key)
        if found is None:
            found = self._caches[key] = RowCache(key[0], self.name, self.revision, self.rows, cache_bytes)
        return found

    def _fetch(self, plan: Plan, cache: str | os.PathLike[str] | RowCache | None) -> Fetch[Batch]:
        """What fetches the blocks of a plan; it refers to no `Dataset`, so that threads keep none alive."""
        client, path = self._client, self._path
        fetch = fetcher(client, path, plan)
        if plan.decoding:
            fetch = decoded_fetch(fetch, plan.decoding, client.pool)
        if cache is None:
            return fetch
        if isinstance(cache, RowCache):
            cache.check(self.name, self.revision)
            if cache.pid != os.getpid():
                cache = self.cache(cache.folder, cache.max_bytes)
        else:
            cache = self.cache(cache)
        return cached_fetch(
            fetch,
            cache,
            plan,
            fetch_fields=lambda names: fetcher(client, path, plan.of_fields(names)),
            take=taker(client, path, self.revision, plan.frame, plan.decoding, client.pool),
            pool=client.pool,
        )

    def _decoding(self, options: OrderOptions) -> tuple[OrderOptions, dict[str, ImageSpec]]:
        """Options as the server knows them, and what is decoded here of what comes.

        Raises
        ------
        ModuleNotFoundError, BadParameter
        """
        asked = options.copy()
        where = asked.pop("decode", None)
        if where not in (None, "server", "client"):
            raise BadParameter(f"decode={where!r} must be 'server' or 'client'")
        if where != "client":
            return asked, {}
        as_stored = names_of(asked.get("encoded"))
        images = {field["name"]: field["decode"] for field in self.info["fields"] if field.get("decode")}
        fields = [name for name in self._chosen(asked) if name in images and name not in as_stored]
        specs = specs_for({name: images[name] for name in fields})
        for name, spec in specs.items():
            if (spec.shape, "uint8") != (self.fields[name].shape, self.fields[name].dtype):
                raise BadAnswer(
                    f"the server has images of {name!r} decoded to {list(spec.shape)}, which is no row of it"
                )
        if specs:
            asked["encoded"] = [*as_stored, *specs]
        return asked, specs

    def _chosen(self, asked: Mapping[str, Any]) -> list[str]:
        """Names of the fields that are asked for."""
        if asked.get("fields") is not None:
            return names_of(asked["fields"])
        found = [*self.fields_of_role("input"), *self.fields_of_role("label")]
        return found or [field.name for field in self.fields.values() if field.readable and not field.ragged]

    def _frame(self, asked: Mapping[str, Any]) -> Frame:
        """What batches of an order, or rows, must be; of what is no field the server says so."""
        fields = [self.fields[name] for name in self._chosen(asked) if name in self.fields]
        return Frame.of(self.rows, fields, names_of(asked.get("encoded")), weighted=tail_of(asked) == "pad")

    def _check_plan(self, plan: PlanInfo, frame: Frame, batch_size: int, asked: Mapping[str, Any]) -> None:
        """Raise `BadAnswer` where a plan is not one of this dataset, or contradicts itself."""
        self._of_this_revision(plan)
        grid = BatchGrid(plan["rows"], batch_size, asked.get("shard") or 0, asked.get("shards") or 1, plan["last"])
        last_rows = grid.size(grid.batches - 1) if grid.batches else 0
        draws = any(asked.get(option) for option in ("balance", "weights", "epoch_rows"))
        if (
            (plan["batches"], plan["last_rows"], plan["last"]) != (grid.batches, last_rows, tail_of(asked))
            or (plan["rows"] > self.rows and not draws)
            or not plan["limits"]["body_bytes"]
        ):
            raise BadAnswer(
                f"the server's plan is not one of {self.rows:,} rows in batches of {batch_size}: {plan!r:.500}"
            )
        frame.check_plan((self._tensor(**tensor) for tensor in plan["tensors"]), batch_size)

    def _of_this_revision(self, answer: Any) -> Any:
        if answer["revision"] != self.revision:
            raise BadAnswer(
                f"revision {self.revision} of {self.name!r} was asked for, but the server answered for "
                f"{answer['revision']}: something between here and the server mixes answers up"
            )
        return answer

    def _tensor(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        if dtype == "bfloat16":
            return Tensor(name, dtype_named("BF16"), tuple(shape), is_bfloat16=True)
        if dtype not in DTYPES:
            raise BadAnswer(f"the server says that {name!r} is of the dtype {dtype!r}: there is none")
        return Tensor(name, DTYPES[dtype], tuple(shape))

    def _params(
        self, split: str | None, options: Mapping[str, Any], known: type, takes: Callable[..., Any]
    ) -> dict[str, str]:
        check_options(options, takes, known.__annotations__)
        params = {name: parameter(value) for name, value in options.items() if value is not None}
        return ({} if split is None else {"split": split}) | params | {"revision": self.revision}


def _unpickled(kind: type[D], client: Client, info: dict[str, Any], told: frozenset[str]) -> D:
    dataset = kind(client, info)
    replaced_told(dataset.name, dataset.revision, told)
    return dataset
