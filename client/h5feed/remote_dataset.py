"""A dataset on a server: its rows, and its batches, read ahead."""

from __future__ import annotations

import math
import operator
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, TypeVar, Unpack, overload
from urllib.parse import unquote

import numpy as np
import numpy.typing as npt

from .answers import DatasetInfo, PlanInfo
from .batch import Batch
from .blocks import Block, Fetch, blocks_from
from .buffers import BufferPool
from .cache import RowCache
from .described import CROPPED, OF_OTHER, check_joins_are_used, without_crops
from .errors import BadAnswer, BadParameter, RowOutOfRange, TooLarge
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
    rows_in,
    taker,
)
from .frames import DTYPES, Frame
from .images import ImageSpec
from .joins import join_parts
from .net.client import Client
from .offsets import axes_of
from .options import OrderOptions, split_options
from .order import BatchGrid
from .plan import Plan, names_of, quoted, tail_of
from .revisions import is_provisional
from .row_selection import key_list, row_ids
from .samples import Samples
from .schema import checked
from .splits import replaced_told, tell_replaced
from .suggestions import did_you_mean
from .summaries import Summaries
from .weights import GivenWeights
from .wire import OFFSETS, ROWS, Tensor, dtype_named, rows_of_other

CODECS = ("zstd",)
"""Values of ``compress``."""

_MAX_PLANS = 256

D = TypeVar("D", bound="RemoteDataset")


class RemoteDataset(Summaries):
    """The part of `h5feed.Dataset` that the training loops use; see there for its attributes."""

    def __init__(self, client: Client, info: dict[str, Any]) -> None:
        super().__init__(client, info)
        self._caches: dict[tuple[str, int | None, int, str], RowCache] = {}
        self._plans: dict[frozenset[tuple[str, Any]], dict[str, Any]] = {}

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

    def join(self: D, *others: str, how: Literal["inner"] | None = None) -> D:
        """This dataset with the fields of others, so that a sample has rows of several datasets of the server.

        The field ``f`` of the dataset ``OTHER`` is named ``OTHER/f``. Loops and batches take it like any other field;
        splits, filters, weights and single rows are those of this dataset. The revisions of the others are fixed now.

        Parameters
        ----------
        *others : str
            ``"OTHER"``: the row of the same number. ``"OTHER:key"``: the row with an equal value of the field ``key``,
            which is unique there. ``"OTHER:key=otherkey"``: if the field has another name there. Classes are compared
            by their names. Percent-encode ``:``, ``@``, ``=`` and ``%`` in names.
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
            name, revision, keys = join_parts(text)
            params = {} if revision is None else {"revision": unquote(revision)}
            info = self._client.json(f"/v1/datasets/{quoted(unquote(name))}", params)
            checked(info, DatasetInfo, "dataset")
            other = RemoteDataset(self._client, info)
            by = "" if keys is None else f":{keys}"
            joins.append((f"{quoted(other.name)}@{other.settle()}{by}", other.info))
        return self._with_joins(joins, how or self._how)

    def owner_of(self, field: str) -> tuple[Samples, str]:
        origin, own = self._origin_of(field)
        return next((RemoteDataset(self._client, info) for _, info in self._joins if info["name"] == origin), self), own

    def joined_by(self, options: dict[str, Any]) -> Self:
        others, how = options.pop("join", None), options.pop("how", None)
        if others is None and how is None:
            return self
        listed = [others] if isinstance(others, str) else list(others or ())
        check_joins_are_used(listed, how, options)
        return self.join(*listed, how=how)

    def joined_that_changed(self) -> list[tuple[str, str, str]]:
        """Name, revision here and revision now of each joined dataset that has changed on the server."""
        found = []
        for text, info in self._joins:
            revision = unquote(join_parts(text).revision or "")
            now = self._client.json(f"/v1/datasets/{quoted(info['name'])}")["revision"]
            # A provisional name may stand for the same content.
            if not is_provisional(now) and not self._client.names.are_same(now, revision):
                found.append((info["name"], revision, now))
        return found

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
                name = f"{info['name']}{OF_OTHER}{field.name}"
                # There is one label: that of this dataset.
                role = "other" if field.role == "label" else field.role
                joined.fields[name] = replace(field, name=name, role=role)
        return joined

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
            request. If it has class names, text is the name of a class, and an integer the stored number.
        duplicates : ``"refuse"`` or ``"all"``
            If several rows have a key, raise `AmbiguousKey`, so that the batch has one row for each key; or return all
            of them, one after the other. ``batch.rows`` are their ids.

        Raises
        ------
        RowOutOfRange, KeysNotFound, AmbiguousKey, TooLarge
        """
        if self._joins and fields is None:
            fields = [name for name in self._chosen({}) if OF_OTHER not in name]
        chosen = {} if fields is None else {"fields": [fields] if isinstance(fields, str) else list(fields)}
        if self._joins and (of_other := next((name for name in chosen["fields"] if OF_OTHER in name), None)):
            raise BadParameter(f"take returns rows of {self.name!r} alone, not {of_other!r}: see batches()")
        if (rows is None) == (keys is None) or (keys is None) != (key is None):
            raise BadParameter("take needs either row ids, or keys= and key=, the field that they are values of")
        if duplicates not in ("refuse", "all"):
            raise BadParameter(f"duplicates={duplicates!r} must be 'refuse' or 'all'")
        if keys is None and duplicates != "refuse":
            raise BadParameter("duplicates= needs keys=: row ids that are listed twice are returned twice")
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
            not_here=CROPPED if is_cropped else "",
            stored=answer["stored"],
            part_rows=part_rows if part_rows < batch_size else 0,
            chunk_rows=max(1, answer.get("rows_decoded_together", 1)),
            note=answer["note"],
            asked=dict(options),
            layout=layout,
            fill=packed["fill"] if (packed := answer.get("packed")) else None,
            bucket_rows=answer.get("bucket_rows"),
        )

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
            Maximum size of the whole folder. Default: all free space but 1 GiB, or but a tenth of the disk if that is
            more.

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
        made_of, uncropped = self._made_of(plan), without_crops(plan)
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
            join, other = join_parts(text), RemoteDataset(self._client, info)
            revision = unquote(join.revision or "")
            fields = [made.field for made in made_of.values() if made.origin == other.name]
            if fields:
                encoded = [self._origin_of(name) for name in names_of(plan.params.get("encoded"))]
                as_stored = [field for origin, field in encoded if origin == other.name]
                frame = other._frame({"fields": fields, "encoded": as_stored})
                found[other.name] = Origin(
                    self._cache_of(other.name, revision, other.rows, folder, cache_bytes),
                    taker(client, other._path, revision, frame, {}, client.pool, as_stored=as_stored),
                    ROWS if join.keys is None else rows_of_other(other.name),
                )
        return found

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

    def _tensor(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        if dtype == "bfloat16":
            return Tensor(name, dtype_named("BF16"), tuple(shape), is_bfloat16=True)
        if dtype not in DTYPES:
            raise BadAnswer(f"the server sent an unknown dtype {dtype!r} for {name!r}")
        return Tensor(name, DTYPES[dtype], tuple(shape))


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
