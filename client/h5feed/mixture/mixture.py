"""Mixtures: several datasets, of one server or of several, as the samples of one training loop."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, Self, Unpack

import numpy as np
import numpy.typing as npt

from .. import lineage
from ..batch import Batch
from ..blocks import Fetch, blocks_from
from ..buffers import BufferPool
from ..cache import RowCache
from ..crops import Crops
from ..dataset import Dataset
from ..described import check_joins_are_used
from ..errors import BadParameter, RevisionChanged
from ..fetching.laying_out import laid_out_fetch
from ..fetching.mixed import SHARED_BYTES, SOURCE, SOURCE_BATCH_BYTES, MixtureFetcher, MixturePlan, SourcePlan
from ..fetching.readahead import ReadAhead, read_ahead
from ..mixing import Mixing, Parts, Stop, tempered, units_of
from ..net import jobs
from ..net.balancing import ReplicaStats
from ..offsets import renamed
from ..options import OrderOptions, SplitOptions
from ..order import BatchGrid
from ..plan import Plan, names_of, parameter, tail_of
from ..ragged import OPTIONS, layout_of
from ..suggestions import check_options, no_field
from ..trainable import Trainable
from ..wire import DATA, INDICES, INDPTR, OFFSETS, ROWS, WEIGHT, Tensor
from .sources import Source, check_not_put_together, common_fields
from .weights import Schedule

_OF_READING = ("fields", "seed", "shuffle")
"""Options of sources that follow from those of the mixture."""

_OWN_OPTIONS = ("shard", "shards", "last", "fields", "epoch", "epoch_rows", *OPTIONS)
"""Options that are those of the mixture, and not passed on to its sources."""


class Mixture(Trainable):
    """Samples of several datasets in one order; made by `mix` and `Feed.mix`.

    ``sequence``, ``loader``, ``torch``, ``tf_data`` and ``batches`` are those of a `Dataset`, with the same options,
    which apply to each source: ``"train"`` are the training rows of all of them. ``seed``, ``shard``, ``shards``,
    ``last`` and ``batch_size`` are those of the mixture.

    The batches have `Batch.source`, the number of the source of each row, and `Batch.rows`, its id in that source.
    ``__source__`` is the source as a field, for example for ``y=["labels", "__source__"]``.

    Attributes
    ----------
    sources : dict of str to Dataset
    fields : dict of str to Field
        Those that sources have in common; those that they have not are not readable, and say why.
    rows : int
        Of all sources.
    name, revision : str
        Those of the sources, joined with ``+``.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        shares: Parts | Schedule | float | None,
        mixed: bool,
        stop: Stop | None,
        epoch_rows: int | None,
    ) -> None:
        self._sources, self._shares, self._mixed = tuple(sources), shares, mixed
        self._stop, self._epoch_rows = stop, epoch_rows
        self.name = "+".join(source.name for source in sources)
        self.rows = sum(source.dataset.rows for source in sources)
        self.fields = common_fields(self._sources)
        labels = self.fields_of_role("label")
        names = self.fields[labels[0]].class_names if labels else None
        self.class_names = list(names) if names else None

    @property
    def sources(self) -> dict[str, Dataset]:
        """The datasets, by name of the source."""
        return {source.name: source.dataset for source in self._sources}

    @cached_property
    def info(self) -> dict[str, Any]:  # type: ignore[override]
        """What the server of the first source says of the fields."""
        first = self._sources[0]
        entries = {entry["name"]: entry for entry in first.dataset.info["fields"]}
        # Fields of joined datasets have no entries.
        own = {name: entries[first.names[name]] for name in self.fields if first.names.get(name) in entries}
        return {"native_splits": False, "fields": [{**entry, "name": name} for name, entry in own.items()]}

    def __repr__(self) -> str:
        fields = ", ".join(f"{f.name}: {f.dtype}{list(f.shape)}" for f in self.fields.values() if f.readable)
        return f"<Mixture of {', '.join(map(repr, self.sources))}, {self.rows} rows, {fields}>"

    @property
    def revision(self) -> str:
        return "+".join(source.dataset.revision for source in self._sources)

    def check_is(self, revision: str) -> None:
        parts = revision.split("+")
        if len(parts) != len(self._sources):
            raise RevisionChanged(f"{self.name!r} has revision {self.revision}, not {revision}")
        for source, part in zip(self._sources, parts, strict=True):
            source.dataset.check_is(part)

    @property
    def via(self) -> str:
        found = {source.name: source.dataset.via for source in self._sources}
        if len(set(found.values())) == 1:
            return next(iter(found.values()))
        return "; ".join(f"{name}: {how}" for name, how in found.items())

    @property
    def replicas(self) -> tuple[ReplicaStats, ...]:
        clients = {id(source.dataset.link): source.dataset for source in self._sources}
        return tuple(one for dataset in clients.values() for one in dataset.replicas)

    def joined_by(self, options: dict[str, Any]) -> Self:
        """A mixture whose sources are joined, each with the datasets of this name on its own server.

        Raises
        ------
        DatasetNotFound, RevisionChanged, BadParameter
        """
        others, how = options.pop("join", None), options.pop("how", None)
        if others is None and how is None:
            return self
        listed = [others] if isinstance(others, str) else list(others or ())
        check_joins_are_used(listed, how, options)
        joined = [source.joined(listed, how) for source in self._sources]
        return type(self)(joined, self._shares, self._mixed, self._stop, self._epoch_rows)

    def crops(self, asked: Mapping[str, Any]) -> Crops | None:
        return None if asked.get("crop") is None else self._sources[0].crops(asked)

    def named_weights(self, weights: str | npt.ArrayLike) -> str:
        """The name of a field of weights.

        Raises
        ------
        BadParameter
            It is an array, which has a weight for each row of one dataset.
        """
        if isinstance(weights, str):
            return weights
        raise BadParameter(
            "weights= of a mixture names a field: give arrays for single sources, with "
            f"h5feed.mix(…, options={{{self._sources[0].name!r}: {{'weights': …}}}})"
        )

    def plan(self, split: str = "all", *, batch_size: int = 32, **options: Unpack[OrderOptions]) -> MixturePlan:
        """The rows and batches of an epoch, known before fetching.

        Raises
        ------
        BadParameter
            A field is not the same in all sources, or a source has no rows, or not enough for an epoch.
        """
        check_options(options, self.plan, OrderOptions.__annotations__)
        given: dict[str, Any] = dict(options)
        if "join" in given or "how" in given:
            return self.joined_by(given).plan(split, batch_size=batch_size, **given)
        if (weights := options.get("weights")) is not None:
            self.named_weights(weights)
        if options.get("sparse") not in (None, "dense", "csr"):
            raise BadParameter(f"sparse={options['sparse']!r} must be 'dense' or 'csr'")
        check_not_put_together(given)
        if options.get("epoch_rows") is not None:
            raise BadParameter("epoch_rows= is an option of mix(): the loops of a mixture have the same epochs")
        fields = self._chosen(options)
        layout = layout_of(self.fields, None if options.get("fields") is None else fields, options)
        if layout is not None:
            fields = list(dict.fromkeys([*fields, *layout.fields]))
        passed_on = {name: value for name, value in given.items() if name not in _OWN_OPTIONS and value is not None}
        of_sources = [name for name in fields if name != SOURCE]
        if given.get("decode_cf") and not any(source.is_packed(of_sources, passed_on) for source in self._sources):
            raise BadParameter(f"decode_cf: none of the fields {of_sources} is packed in any source: leave it out")
        # A started batch of each source is kept while mixed batches take rows of it.
        source_bytes = min(SOURCE_BATCH_BYTES, SHARED_BYTES // (2 * len(self._sources)))
        sources = tuple(source.plan(split, of_sources, passed_on, source_bytes) for source in self._sources)
        mixing = self._mixing(tuple(source.plan.rows for source in sources), batch_size, int(options.get("seed") or 0))
        last = tail_of(options)
        grid = BatchGrid(mixing.rows, batch_size, options.get("shard") or 0, options.get("shards") or 1, last)
        largest = max(source.plan.batch_bytes / source.plan.batch_size for source in sources)
        first = sources[0].plan
        return MixturePlan(
            rows=mixing.rows,
            batches=grid.batches,
            batch_bytes=math.ceil(batch_size * largest) + (0 if layout is None else layout.nbytes(batch_size)),
            params=self._params(split, batch_size, options, mixing, sources),
            batch_size=batch_size,
            tensors=self._tensors(sources, batch_size, last == "pad", SOURCE in fields),
            max_rows=first.max_rows,
            max_bytes=first.max_bytes,
            last_rows=grid.size(grid.batches - 1) if grid.batches else 0,
            frame=first.frame,
            decoding={},
            mixing=mixing,
            grid=grid,
            sources=sources,
            layout=layout,
            asked=dict(options),
        )

    def batch(self, index: int, *, split: str = "all", batch_size: int = 32, **options: Unpack[OrderOptions]) -> Batch:
        """Batch `index` of an order.

        Raises
        ------
        BatchOutOfRange
        """
        check_options(options, self.batch, OrderOptions.__annotations__)
        if "join" in options or "how" in options:
            given: dict[str, Any] = dict(options)
            return self.joined_by(given).batch(index, split=split, batch_size=batch_size, **given)
        plan = self.plan(split, batch_size=batch_size, **options)
        plan.grid.size(index)
        reading = self.read_passes(plan, int(options.get("epoch") or 0), index, index + 1, connections=1)
        try:
            return next(reading)
        finally:
            reading.close()

    def read_passes(
        self,
        plan: Plan,
        epoch: int,
        start: int,
        stop: int | None = None,
        *,
        connections: int | None = None,
        readahead: int | None = None,
        cache: str | os.PathLike[str] | tuple[RowCache, ...] | None = None,
        waits: Callable[[], str | None] = lambda: None,
        pool: BufferPool | None = None,
    ) -> ReadAhead[Batch]:
        assert isinstance(plan, MixturePlan)
        if isinstance(cache, RowCache):
            raise BadParameter(f"cache= is the cache of {cache.dataset!r} alone: give the path of its folder")
        caches = cache if isinstance(cache, tuple) else (cache,) * len(self._sources)
        fetches, seconds = zip(
            *(
                source.dataset.fetch_of(of_source.plan, own, pool)
                for source, of_source, own in zip(self._sources, plan.sources, caches, strict=True)
            ),
            strict=True,
        )
        pool = pool or self._sources[0].dataset.pool
        fetch: Fetch[Batch] = MixtureFetcher(plan, fetches, self.revision, pool)
        if plan.layout is not None:
            fetch = laid_out_fetch(fetch, plan.layout, pool)
        links = [source.dataset.link for source in self._sources]
        link = max(links, key=lambda link: link.width)
        return read_ahead(
            fetch, blocks_from(plan, epoch, start, stop), sum(seconds), connections, readahead, link, waits
        )

    def cache(self, folder: str | os.PathLike[str], cache_bytes: int | None = None) -> tuple[RowCache, ...]:
        """The local caches of all sources in a folder: see `Dataset.cache`."""
        return tuple(source.dataset.cache(folder, cache_bytes) for source in self._sources)

    def splits(self, *, classes: str | None = None, **options: Unpack[SplitOptions]) -> Mapping[str, Any]:
        """The classes of a label over all rows of all sources.

        Raises
        ------
        BadParameter
            Anything else of splits was asked for: each source has its own.
        """
        if classes is None or options:
            raise BadParameter("a mixture has no splits of its own: ask the datasets in mixture.sources")
        found = [source.dataset.splits(classes=source.names[classes]) for source in self._sources]
        kinds = {answer.get("classes_are") for answer in found}
        entries = [answer["splits"]["all"].get("classes") for answer in found]
        if any(answer.get("classes_of") is None for answer in found) or len(kinds) > 1 or None in entries:
            return {"classes_of": None, "splits": {"all": {}}}
        by_value = {entry["value"]: entry for listed in reversed(entries) for entry in listed}
        merged = [{"value": value, "name": by_value[value]["name"]} for value in sorted(by_value)]
        return {"classes_of": classes, "classes_are": kinds.pop(), "splits": {"all": {"classes": merged}}}

    def stats(self, split: str = "all", *, field: str, **options: Unpack[SplitOptions]) -> Mapping[str, Any]:
        """Not for mixtures.

        Raises
        ------
        BadParameter
        """
        raise BadParameter(
            f"the server knows the statistics of each source, not of their mixture: give numbers for {field!r}, such "
            f"as those of mixture.sources[{self._sources[0].name!r}].stats({split!r}, field=…)"
        )

    def source(
        self,
        split: str = "all",
        *,
        batch_size: int = 32,
        timeout: float = jobs.TIMEOUT,
        **options: Unpack[OrderOptions],
    ) -> lineage.Source:
        """The record of an order, to log with a training run: see `Dataset.source`.

        Raises
        ------
        Preparing, ReadTimeout
        BadParameter
            The weights are a function, which a record cannot have.
        """
        given: dict[str, Any] = dict(options)
        samples = self.joined_by(given)
        plan = samples.plan(split, batch_size=batch_size, **given)
        return samples.recorded(plan, {**given, "batch_size": batch_size}, timeout)

    def recorded(self, plan: Plan, options: Mapping[str, Any], timeout: float) -> lineage.Source:
        assert isinstance(plan, MixturePlan)
        given = {one.name: lineage.recorded_options(one.options) for one in self._sources}
        mix: dict[str, Any] = {
            "mixed": self._mixed,
            "stop": self._stop,
            "epoch_rows": self._epoch_rows,
            "fields": {source.name: source.renamed for source in self._sources if source.renamed},
            "options": {name: own for name, own in given.items() if own},
        }
        if self._shares is None:
            mix["round_robin"] = True
        elif isinstance(self._shares, float):
            mix["temperature"] = self._shares
        elif isinstance(self._shares, Schedule):
            mix["weights"] = {str(epoch): list(parts) for epoch, parts in self._shares.table.items()}
        else:
            mix["weights"] = list(self._shares)
        records = {}
        for source, of_source in zip(self._sources, plan.sources, strict=True):
            own = of_source.plan
            asked = {name: value for name, value in own.asked.items() if name not in _OF_READING}
            records[source.name] = lineage.source_of(source.dataset, own.params["split"], asked, timeout)
        return lineage.Source(
            url=",".join(dict.fromkeys(record.url for record in records.values())),
            dataset=self.name,
            revision="+".join(record.revision for record in records.values()),
            split=plan.params["split"],
            options=lineage.recorded_options(options),
            rows=sum(record.rows for record in records.values()),
            digest=_digest([mix, *([name, record.rows, record.digest] for name, record in records.items())]),
            fields={name: about for name, about in lineage.described_fields(self).items() if name != SOURCE},
            mixture={"sources": {name: record.record() for name, record in records.items()}, "mix": mix},
        )

    def _chosen(self, options: Mapping[str, Any]) -> list[str]:
        """Names of the requested fields.

        Raises
        ------
        FieldNotFound, BadParameter
        """
        if options.get("fields") is None:
            chosen = [*self.fields_of_role("input"), *self.fields_of_role("label")]
            found = chosen or [one.name for one in self.fields.values() if one.readable and not one.ragged]
            found = [name for name in [*found, *renamed(options)] if name != SOURCE]
            if not found and not options.get("pad"):
                reasons = "; ".join(f"{one.name!r}: {one.reason}" for one in self.fields.values() if one.reason)
                raise BadParameter(f"the sources have no field in common ({reasons})")
            return found
        found, other_names = names_of(options["fields"]), renamed(options)
        for name in found:
            if name in other_names:
                continue
            if name not in self.fields:
                raise no_field(name, self.fields, f"the mixture {self.name!r} has no field")
            if not self.fields[name].readable:
                raise BadParameter(f"the field {name!r} cannot be mixed: {self.fields[name].reason}")
        return found

    def _mixing(self, sizes: Parts, batch_size: int, seed: int) -> Mixing:
        """The assignment of samples for sources of these sizes."""
        unit = 1 if self._mixed else max(1, batch_size)
        parts = tempered(sizes, self._shares) if isinstance(self._shares, float) else self._shares
        if self._epoch_rows is not None:
            units = self._epoch_rows // unit
        else:
            assert self._stop is not None and not isinstance(parts, Schedule)
            units = units_of(sizes, parts, unit, self._stop)
        if not units:
            shortest = min(range(len(sizes)), key=sizes.__getitem__)
            raise BadParameter(
                f"there are not enough rows for an epoch: the source {self._sources[shortest].name!r} has "
                f"{sizes[shortest]}: use stop='all', or a smaller batch_size with mixed=False"
            )
        return Mixing(sizes, units, unit, parts, self._stop, seed)

    def _params(
        self,
        split: str,
        batch_size: int,
        options: Mapping[str, Any],
        mixing: Mixing,
        sources: Sequence[SourcePlan],
    ) -> dict[str, Any]:
        """What determines the order; states are compared by it."""
        if mixing.parts is None:
            weights = "round robin"
        else:
            parts = mixing.parts
            weights = parts.described if isinstance(parts, Schedule) else json.dumps(parts)
        of_sources = []
        for source, of_source in zip(self._sources, sources, strict=True):
            of_sources.append([source.name, {**of_source.plan.order, "seed": None}])
        params = {
            "split": split,
            "shuffle": parameter(bool(options.get("shuffle"))),
            "batch_size": str(batch_size),
            "seed": str(mixing.seed),
            "mixture": weights,
            "rows_together": str(mixing.unit),
            "stop": str(self._stop),
            "epoch_rows": str(mixing.rows),
            "sources": json.dumps(of_sources),
            "revision": self.revision,
        }
        given = {
            name: parameter(options[name]) for name in ("shard", "shards", "last") if options.get(name) is not None
        }
        return params | given

    def _tensors(
        self, sources: Sequence[SourcePlan], batch_size: int, padded: bool, has_source: bool
    ) -> tuple[Tensor, ...]:
        """The tensors of a batch.

        Raises
        ------
        BadParameter
            A field arrives differently from different sources.
        """
        tensors = [Tensor(ROWS, np.dtype("<i8"), (batch_size,))]
        tensors += [Tensor(WEIGHT, np.dtype("<f4"), (batch_size,))] if padded else []
        tensors += [Tensor(SOURCE, np.dtype("<i8"), (batch_size,))] if has_source else []
        for name in dict.fromkeys(name for source in sources for name in source.names):
            found = [source.tensors.get(source.names.get(name, "")) for source in sources]
            kinds = [
                None if one is None else (one.dtype, one.shape[1:], one.name + OFFSETS in source.tensors)
                for source, one in zip(sources, found, strict=True)
            ]
            if len(set(kinds)) > 1:
                raise BadParameter(f"the field {name!r} arrives as {kinds} from the sources: give all the same options")
            first = found[0]
            if first is None or kinds[0] is None:
                continue
            csr = [None if one.plan.dense else one.indices_of(name) for one in sources]
            if any(dtype is not None for dtype in csr):
                if None in csr:
                    raise BadParameter(
                        f"sparse='csr': the rows of {name!r} are sparse in some sources only: use 'dense'"
                    )
                index = max((dtype for dtype in csr if dtype is not None), key=lambda dtype: dtype.itemsize)
                tensors.append(Tensor(name + DATA, first.dtype, (0,)))
                tensors.append(Tensor(name + INDICES, index, (0,)))
                tensors.append(Tensor(name + INDPTR, np.dtype("<i8"), (batch_size + 1,)))
                continue
            is_flat = kinds[0][2]
            tensors.append(replace(first, name=name, shape=first.shape if is_flat else (batch_size, *first.shape[1:])))
            if is_flat:
                tensors.append(Tensor(name + OFFSETS, np.dtype("<i8"), (batch_size + 1,)))
        return tuple(tensors)


def _digest(content: Any) -> str:
    """Digest of values that JSON has, 32 hexadecimal digits."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
