"""A served dataset: its fields, its splits, its batches."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, overload
from urllib.parse import quote, unquote

import numpy as np
import numpy.typing as npt

from .batch import Batch
from .cache import RowCache
from .cache.fetch import Take, cached_fetch
from .errors import BadAnswer, BadParameter
from .images import ImageSpec
from .net import jobs
from .net.client import Client
from .net.pace import Pace
from .net.trace import received, retried
from .net.transport import BodyCut
from .reading.decoding import decoded, decoded_batch, decoded_fetch, specs_for
from .reading.passes import blocks_of_passes
from .reading.readahead import Block, Fetch, ReadAhead, blocks_of
from .splits import Splits, replaced_told, tell_replaced
from .stats import FieldStats, Stats
from .tables import titled_table
from .wire import OFFSETS, ROWS, WEIGHT, Tensor, dtype_named, read_body, read_runs

if TYPE_CHECKING:
    from .keras import Sequence as KerasSequence
    from .reading.loader import Loader
    from .torch import TorchBatches, TorchRows

BLOCK_BYTES = 8 << 20
"""Bytes: small batches are asked for together up to this much; one request a batch would be many times slower."""

DEFAULT_CONNECTIONS: int | None = None
"""Requests in flight at most; None: as many as the link needs, up to `pace.MAX_WIDTH`."""

DEFAULT_READAHEAD = 64 << 20
"""Bytes fetched ahead of the training loop at most."""

_MAX_PLANS = 256


class SplitOptions(TypedDict, total=False):
    """Which rows: see "Split spec" of the HTTP API."""

    test: float | int
    """A float is a fraction of all rows, an int a count."""
    val: float | int
    stratify: str
    """Field to stratify by, or ``"none"``; default: the label field where it is class-like."""
    split_seed: int
    split_shuffle: bool
    group: str
    """Field whose equal values stay together: patients, episodes, videos."""
    folds: int
    """Cross-validation: ``val`` is fold `fold` of so many, ``train`` the others."""
    fold: int


def split_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options that divide rows: without such, `stratify` is of ``balance``."""
    found = {name: value for name, value in options.items() if name in SplitOptions.__annotations__}
    if all(found.get(name) is None for name in ("test", "val", "folds")):
        found.pop("stratify", None)
    return found


class OrderOptions(SplitOptions, total=False):
    """Which rows, in which order: see "Order spec" of the HTTP API."""

    shuffle: bool
    seed: int
    epoch: int
    window: int
    """Rows to shuffle among: for files whose chunks hold many rows."""
    balance: bool
    """Each class equally often, with repeats."""
    weights: str
    """Field of numbers: rows as often as theirs says, with repeats."""
    epoch_rows: int
    """Rows of an epoch with `balance` or `weights`; default: as many as the split has."""
    limit: int
    shard: int
    shards: int
    last: Literal["keep", "drop", "pad"]
    fields: Sequence[str]
    encoded: Sequence[str]
    """Those of them that are stored as JPEG or PNG and are to come so, as bytes: see `Batch.lists`."""
    decode: Literal["server", "client"]
    """Where images that are stored as JPEG or PNG are decoded. ``client``: a tenth of the bytes travel, and the threads
    that fetch ahead decode them, to the same pixels; needs ``h5feed[decode]``."""


@dataclass(frozen=True)
class Field:
    """One array of a dataset, without its row axis."""

    name: str
    role: str
    """``input``, ``label``, ``weight`` or ``other``."""
    shape: tuple[int, ...]
    """Shape of one sample."""
    dtype: str
    """numpy's name of the dtype of the arrays that arrive."""
    readable: bool
    reason: str | None
    """Why it is not served, where it is not."""
    ragged: bool = False
    """Whether rows have lengths of their own: they arrive flat, with where each begins in ``NAME.offsets``."""
    class_names: tuple[str, ...] | None = None
    """Names of the classes that its numbers stand for, where the file says them."""


@dataclass(frozen=True)
class Plan:
    """What one epoch of an order looks like, known before the first fetch."""

    rows: int
    batches: int
    batch_bytes: int
    """Bytes of one full batch on the wire."""
    params: Mapping[str, str]
    """The order spec with the revision pinned."""
    batch_size: int
    tensors: tuple[Tensor, ...]
    """What a full batch consists of when it is handed out, the row ids and weights included."""
    max_rows: int
    """Rows of one answer of the server at most."""
    max_bytes: int
    """Bytes of one answer at most."""
    decoding: Mapping[str, ImageSpec]
    """Fields that come as bytes of image files, and what they are decoded to here."""
    stored: bool | None = None
    """Whether the rows are those of a split that is stored; None for all rows."""
    note: str | None = None
    """What one might not expect of the splits, and which stored ones they take the place of."""


class Dataset:
    """A dataset on a server, as it was when asked for: every request names its revision, so that data which changed
    meanwhile is an error (`RevisionChanged`), never a mixture.

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
        return _unpickled, (self._client, self.info, replaced_told(self.name, self.revision))

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

    def fields_of_role(self, role: str) -> list[str]:
        """Names of the readable fields of a role whose rows are arrays of one shape."""
        found = [field for field in self.fields.values() if field.role == role and field.readable]
        return [field.name for field in found if not field.ragged]

    def batch(self, index: int, *, split: str = "all", batch_size: int = 32, **options: Unpack[OrderOptions]) -> Batch:
        """Batch `index` of an order."""
        asked, decoding = self._decoding(options)
        params = self._params(split, asked, OrderOptions) | {"batch_size": str(batch_size)}
        found = _only_batch(self._client.body(f"{self._path}/batches/{index}", params))
        batch = _asked_for([found], index, int(options.get("epoch") or 0), self.revision)[0]
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
        found = _only_batch(self._client.body(f"{self._path}/rows", {"revision": self.revision}, json=request))
        if found.revision != self.revision or not np.array_equal(found.rows, wanted):
            raise BadAnswer(
                f"{len(wanted)} rows of revision {self.revision} were asked for, but {len(found.rows)} of revision "
                f"{found.revision} came, or others: something between here and the server mixes answers up"
            )
        return found

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
        params = self._params(None, options, SplitOptions) | ({} if classes is None else {"classes": classes})
        ask = partial(self._client.json, f"{self._path}/splits", params)
        return Splits(jobs.wait_for(ask, "splits", timeout, progress))

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
        params = self._params(split, options, SplitOptions) | ({} if field is None else {"field": field})
        ask = partial(self._client.json, f"{self._path}/stats", params)
        answer = jobs.wait_for(ask, "statistics", timeout, progress)
        found = Stats(answer)
        if answer.get("replaces"):
            tell_replaced(self.name, self.revision, split_options(options), answer["note"])
        return found if field is None else found[field]

    def mean_image(self, field: str, split: str = "all", **options: Unpack[SplitOptions]) -> npt.NDArray[np.float32]:
        """The mean of a field's images over the rows of a split, and of no others, (*sample,) float32."""
        params = self._params(split, options, SplitOptions) | {"field": field}
        ask = partial(self._client.body, f"{self._path}/stats/mean-image", params)
        body = jobs.wait_for(ask, "statistics", jobs.TIMEOUT, None)
        image: npt.NDArray[np.float32] = read_body(body)[0]["mean_image"]
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
        params = self._params(None, options, SplitOptions)
        ask = partial(self._client.body, f"{self._path}/splits/{quote(split, safe='')}/rows", params)
        tensors, about, _ = read_body(jobs.wait_for(ask, "rows of the split", timeout, progress))
        if "replaced" in about:
            tell_replaced(self.name, self.revision, split_options(options), about["replaced"])
        rows: npt.NDArray[np.int64] = tensors[ROWS]
        return rows

    def sequence(self, split: str = "all", **options: Any) -> KerasSequence:
        """A `keras.utils.PyDataset` of this dataset; see `h5feed.keras.Sequence` for the options."""
        try:
            from .keras import Sequence as KerasSequence
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                f"a Sequence needs Keras 3 with a backend, but there is no {error.name!r}: `pip install keras jax` and "
                "set KERAS_BACKEND=jax, or use tensorflow or torch",
                name=error.name,
            ) from error

        return KerasSequence(self, split, **options)

    def loader(self, split: str = "all", **options: Any) -> Loader:
        """Passes over a split for a loop of your own, as ``(x, y)``; options: `h5feed.reading.loader.Loader`."""
        from .reading.loader import Loader

        return Loader(self, split, **options)

    def torch(self, split: str = "all", **options: Any) -> TorchBatches:
        """A `torch.utils.data.IterableDataset` of batches; see `h5feed.torch.TorchBatches` for the options."""
        from .torch import TorchBatches

        return TorchBatches(self, split, **options)

    def torch_map(self, split: str = "all", **options: Any) -> TorchRows:
        """A `torch.utils.data.Dataset` of single rows; see `h5feed.torch.TorchRows` for the options."""
        from .torch import TorchRows

        return TorchRows(self, split, **options)

    def tf_data(self, split: str = "all", **options: Any) -> Any:
        """A `tf.data.Dataset` of batches; see `h5feed.tf.tf_data` for the options."""
        from .tf import tf_data

        return tf_data(self, split, **options)

    def plan(self, split: str = "all", *, batch_size: int = 32, **options: Unpack[OrderOptions]) -> Plan:
        """What an epoch of this order will be."""
        asked, decoding = self._decoding(options)
        params = self._params(split, asked, OrderOptions) | {"batch_size": str(batch_size)}
        # How an order is cut into batches does not depend on the order, and cannot change within a revision.
        cut = frozenset(item for item in params.items() if item[0] not in ("shuffle", "seed", "epoch"))
        answer = self._plans.get(cut)
        if answer is None:
            answer = self._client.json(f"{self._path}/plan", params)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[cut] = answer
            if answer.get("replaces") and params.get("shard", "0") == "0":
                tell_replaced(self.name, self.revision, split_options(options), answer["note"])
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
            decoding=decoding,
            stored=answer.get("stored"),
            note=answer.get("note"),
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
        fetch = _fetcher(client, path, plan.params)
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
            fetch_fields=lambda names: _fetcher(client, path, _of_fields(plan.params, names)),
            take=_taker(client, path, self.revision, plan.decoding),
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
        fields = asked.get("fields")
        if fields is None:
            fields = [*self.fields_of_role("input"), *self.fields_of_role("label")] or list(self.fields)
        if isinstance(fields, str):
            fields = [unquote(name) for name in fields.split(",")]
        as_stored = asked.get("encoded") or ()
        images = {field["name"]: field["decode"] for field in self.info["fields"] if field.get("decode")}
        specs = specs_for({name: images[name] for name in fields if name in images and name not in as_stored})
        if specs:
            asked["encoded"] = [*as_stored, *specs]
        return asked, specs

    def _tensor(self, name: str, dtype: str, shape: Sequence[int]) -> Tensor:
        field = self.fields.get(name)
        is_bfloat16 = field is not None and field.dtype == "bfloat16"
        return Tensor(name, dtype_named("BF16") if is_bfloat16 else np.dtype(dtype), tuple(shape), is_bfloat16)

    def _params(self, split: str | None, options: Mapping[str, Any], known: Any) -> dict[str, str]:
        if unknown := sorted(set(options) - set(known.__annotations__)):
            raise BadParameter(f"unknown option {unknown[0]!r}: known are {', '.join(sorted(known.__annotations__))}")
        params = {name: _encode(value) for name, value in options.items() if value is not None}
        return ({} if split is None else {"split": split}) | params | {"revision": self.revision}


def _unpickled(client: Client, info: dict[str, Any], told: frozenset[str]) -> Dataset:
    dataset = Dataset(client, info)
    replaced_told(dataset.name, dataset.revision, told)
    return dataset


def _fetcher(client: Client, path: str, params: Mapping[str, str]) -> Callable[[Block, threading.Event], list[Batch]]:
    """A function that fetches one block; it refers to no `Dataset`, so that threads keep none alive."""

    def fetch(block: Block, cancelled: threading.Event) -> list[Batch]:
        query = {**params, "epoch": str(block.epoch)}
        batches: list[Batch] = []
        start, alone = block.start, False
        while start < block.stop:
            if alone or block.stop - start == 1:
                # The first missing batch of a broken stream, asked for alone, answers with the reason.
                body = client.body(f"{path}/batches/{start}", query, cancelled=cancelled)
                batches += _asked_for([_only_batch(body)], start, block.epoch, params.get("revision"))
                alone = False
            else:
                window = {"start": str(start), "stop": str(block.stop)}
                try:
                    body = client.body(f"{path}/batches", query | window, cancelled=cancelled, raise_cut=True)
                except BodyCut as cut:
                    body, alone = cut.received, True
                    received(len(body))
                    retried()
                came = list(_whole_batches(body, cut=alone))
                if len(came) > block.stop - start:
                    raise BadAnswer(f"batches {start} … {block.stop - 1} were asked for, but {len(came)} came")
                batches += _asked_for(came, start, block.epoch, params.get("revision"))
                # A stream without a whole batch is not asked for again and again.
                alone = alone or start == block.start + len(batches)
            start = block.start + len(batches)
        return batches

    return fetch


def _of_fields(params: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The same order, of other fields."""
    found = {**params, "fields": _encode(list(names))}
    encoded = [name for name in found.pop("encoded", "").split(",") if unquote(name) in names]
    return found | ({"encoded": ",".join(encoded)} if encoded else {})


def _taker(client: Client, path: str, revision: str, decoding: Mapping[str, ImageSpec]) -> Take:
    """A function that fetches rows by their ids."""

    def take(
        rows: npt.NDArray[np.int64], fields: Sequence[str], cancelled: threading.Event
    ) -> dict[str, npt.NDArray[Any]]:
        specs = {name: spec for name, spec in decoding.items() if name in fields}
        request = {"rows": rows.tolist(), "fields": list(fields)} | ({"encoded": list(specs)} if specs else {})
        body = client.body(f"{path}/rows", {"revision": revision}, json=request, cancelled=cancelled)
        tensors, metadata, _ = read_body(body)
        if metadata.get("revision") != revision or not np.array_equal(tensors.get(ROWS, ()), rows):
            raise BadAnswer("rows came that were not asked for: something between here and the server mixes answers up")
        return decoded(tensors, rows, specs, client.pool, cancelled) if specs else tensors

    return take


def _whole_batches(body: npt.NDArray[np.uint8], *, cut: bool = False) -> Iterator[Batch]:
    """The batches in a body; with `cut`, those before its broken end."""
    try:
        for run in read_runs(body):
            stacked = dict(run.tensors)
            try:
                rows = stacked.pop(ROWS)
                epoch, revision = int(run.metadata["epoch"]), run.metadata["revision"]
            except (KeyError, ValueError) as error:
                raise BadAnswer(f"the answer is no batch: {error} is missing") from None
            weights = stacked.pop(WEIGHT, None)
            for number, index in enumerate(run.indices):
                yield Batch(
                    {name: tensor[number] for name, tensor in stacked.items()},
                    rows[number],
                    None if weights is None else weights[number],
                    index=index,
                    epoch=epoch,
                    revision=revision,
                )
    except BadAnswer:
        if not cut:
            raise


def _asked_for(batches: list[Batch], first: int, epoch: int, revision: str | None) -> list[Batch]:
    """These batches, if they are `first` and its followers, of that epoch and revision.

    Raises
    ------
    BadAnswer
        They are others: a proxy or a cache has mixed answers up.
    """
    for index, batch in enumerate(batches, first):
        if (batch.index, batch.epoch) != (index, epoch) or revision not in (None, batch.revision):
            raise BadAnswer(
                f"batch {index} of epoch {epoch} was asked for, but batch {batch.index} of epoch {batch.epoch} came "
                f"(revision {batch.revision}, not {revision}): something between here and the server mixes answers up"
            )
    return batches


def _only_batch(body: npt.NDArray[np.uint8]) -> Batch:
    """The batch in a body of one."""
    batches = list(_whole_batches(body))
    if len(batches) != 1:
        raise BadAnswer(f"the answer has {len(batches)} batches where one was asked for")
    return batches[0]


def _encode(value: object) -> str:
    """A parameter as the API writes it: fractions with a decimal point, lists with commas."""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating)):
        return np.format_float_positional(float(value), trim="0")
    if isinstance(value, (list, tuple)):
        return ",".join(quote(str(item), safe="") for item in value)
    return str(value)
