"""The sources of a mixture, and the fields that they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from ..crops import Crops
from ..dataset import Dataset
from ..errors import BadParameter
from ..fetching.mixed import MOST_SOURCE_ROWS, SOURCE, SourcePlan
from ..frames import Field
from ..offsets import MASK, Taken, offsets_of, offsets_text, renamed
from ..plan import conditions, names_of
from ..ragged import OPTIONS
from ..suggestions import no_field
from ..wire import CROP

_FIELD_OPTIONS = ("encoded", "crop_fields", "stratify", "group", "weights", "episode", "offsets")
"""Options that name fields. Conditions of ``where`` name those of the sources."""

_OF_LOOPS = ("fields", "batch_size", "epoch", "shard", "shards", "last")
"""Options that only the mixture as a whole has."""

_OF_ONE_DATASET = ("bucket", "bucket_by", "bucket_group", "pack", "pack_by", "overlong")
"""Options that put several rows of one dataset together, by their lengths."""


@dataclass(frozen=True)
class Source:
    """A dataset of a mixture.

    Attributes
    ----------
    names : mapping of str to str
        Its own name of each field, by the name in the mixture.
    options : mapping
        Options that replace those of the loop.
    """

    name: str
    dataset: Dataset
    names: Mapping[str, str]
    options: Mapping[str, Any]

    @property
    def renamed(self) -> dict[str, str]:
        """The new names of fields, as `h5feed.mix` takes them."""
        return {own: name for name, own in self.names.items() if name != own}

    def plan(self, split: str, fields: Sequence[str], options: Mapping[str, Any], batch_bytes: int) -> SourcePlan:
        """How it is read, in batches of about `batch_bytes`."""
        chosen: dict[str, Any] = {"split": split, **options}
        for option in _FIELD_OPTIONS:
            if chosen.get(option) is not None and option not in self.options:
                chosen[option] = self.with_own_names(option, chosen[option])
        if conditions(chosen.get("where")) and "where" not in self.options:
            self._check_names_in_conditions()
        chosen |= self.options
        chosen["sparse"] = chosen.get("sparse") or "dense"
        names = {**self.names, **{name: name for name in renamed(options)}}
        own_fields = [names[name] for name in fields]
        if chosen.get("decode_cf") and "decode_cf" not in self.options and not self.is_packed(fields, options):
            # Another source is: the mixture has checked that.
            del chosen["decode_cf"]
        one = self.dataset.plan(**chosen, fields=own_fields, batch_size=1)
        if not one.rows:
            raise BadParameter(f"the source {self.name!r} has no rows in {chosen['split']!r} to mix")
        rows = max(1, min(MOST_SOURCE_ROWS, batch_bytes // max(1, one.batch_bytes)))
        plan = self.dataset.plan(**chosen, fields=own_fields, batch_size=rows)
        masks = {name + MASK: names[name] + MASK for name in fields if names[name] + MASK in plan.frame.masks}
        starts = {CROP: CROP} if CROP in plan.frame.tensors else {}
        return SourcePlan(plan, names | masks | starts)

    def joined(self, others: Sequence[str], how: Literal["inner"] | None) -> Source:
        """This source with the fields of other datasets of its server, under their own names."""
        dataset = self.dataset.join(*others, how=how)
        added = {name: name for name in dataset.fields if name not in self.dataset.fields}
        for name in added:
            if name in self.names:
                raise BadParameter(f"join=: the source {self.name!r} has a field {name!r} already")
        return replace(self, dataset=dataset, names={**self.names, **added})

    def crops(self, asked: Mapping[str, Any]) -> Crops | None:
        """`Samples.crops` of its rows, by the names in the mixture."""
        own = {option: self.with_own_names(option, asked[option]) for option in ("crop_fields",) if asked.get(option)}
        fields = {self.names.get(name, name): name for name in names_of(asked.get("fields"))}
        found = self.dataset.crops({**asked, **own, "fields": list(fields)})
        return None if found is None else found._replace(fields=tuple(fields[name] for name in found.fields))

    def is_packed(self, fields: Sequence[str], options: Mapping[str, Any]) -> bool:
        """Whether ``decode_cf`` unpacks any of the fields of the mixture here."""
        stored = [renamed(options).get(name, name) for name in fields]
        return bool(self.dataset.packed_fields([self.names.get(name, name) for name in stored], {}))

    def with_own_names(self, option: str, value: Any) -> Any:
        """The value of an option, with the dataset's own names of the fields that it names."""

        def own(name: str) -> str:
            return self.names.get(name, name)

        if option in ("encoded", "crop_fields"):
            return [own(name) for name in names_of(value)]
        if option != "offsets":
            return own(value)
        found = {}
        for name, taken in offsets_of(value).items():
            is_renamed = name != taken.field
            if is_renamed and (name in self.names or name in self.dataset.fields):
                raise BadParameter(
                    f"offsets: {name!r} is a field of its own in the source {self.name!r}: choose another name"
                )
            found[name if is_renamed else own(name)] = Taken(own(taken.field), taken.offsets)
        return offsets_text(found)

    def _check_names_in_conditions(self) -> None:
        """Raise `BadParameter` if a name in a condition may mean two fields."""
        for name, own in self.names.items():
            if name != own and name in self.dataset.fields:
                raise BadParameter(
                    f"where= names fields of the sources, but {name!r} is another field in the mixture than in the "
                    f"source {self.name!r}: give conditions with options={{{self.name!r}: {{'where': …}}}}"
                )


def datasets_of(sources: Any) -> tuple[dict[str, Dataset], dict[str, float] | None]:
    """The datasets by name of the source, and their weights if they are given together with them.

    Raises
    ------
    BadParameter
    """
    items = sources.items() if isinstance(sources, Mapping) else ((None, value) for value in sources)
    datasets: dict[str, Dataset] = {}
    weights: dict[str, Any] = {}
    for name, value in items:
        dataset, *weight = value if isinstance(value, tuple) else (value,)
        if isinstance(name, Dataset):
            # {dataset: weight}
            dataset, weight, name = name, [value], None
        if not isinstance(dataset, Dataset) or len(weight) > 1:
            raise BadParameter(
                f"{value!r} is not a source: give datasets, or pairs of a dataset and its weight, such as "
                "h5feed.mix([(feed['photos'], 0.7), (feed['drawings'], 0.3)]), or names to feed.mix"
            )
        key = dataset.name if name is None else str(name)
        if key in datasets:
            raise BadParameter(
                f"there are two sources {key!r}: name them, as in h5feed.mix({{'one': (…, 0.7), 'two': (…, 0.3)}})"
            )
        datasets[key] = dataset
        if weight:
            weights[key] = weight[0]
    if not datasets:
        raise BadParameter("a mixture needs at least one source")
    if weights and len(weights) < len(datasets):
        missing = [name for name in datasets if name not in weights]
        raise BadParameter(f"the source {missing[0]!r} has no weight, but others have: give all of them, or none")
    return datasets, weights or None


def names_in(source: str, dataset: Dataset, given: Mapping[str, str]) -> dict[str, str]:
    """The dataset's own name of each field, by the name in the mixture.

    Raises
    ------
    FieldNotFound
    BadParameter
        Two fields would have the same name.
    """
    for own in given:
        if own not in dataset.fields:
            raise no_field(own, dataset.fields, f"the source {source!r} has no field")
    names: dict[str, str] = {}
    for own in dataset.fields:
        name = given.get(own, own)
        if name in names:
            raise BadParameter(
                f"fields: the source {source!r} would have two fields {name!r}: rename {name!r} as well, such as "
                f"{{{name!r}: 'other'}}"
            )
        names[name] = own
    return names


def options_in(source: str, dataset: Dataset, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a source, with an array of weights named by its digest.

    Raises
    ------
    BadParameter
    """
    options = dict(given)
    for option in ("join", "how"):
        if options.get(option) is not None:
            raise BadParameter(
                f"options: the source {source!r} has {option}=: join the dataset before you mix it, with "
                "dataset.join('OTHER')"
            )
    for option in ("crop", "sparse", *_OF_LOOPS, *OPTIONS):
        if options.get(option) is not None:
            raise BadParameter(f"options: the source {source!r} has {option}=: give it to the loop, for all sources")
    check_not_put_together(options)
    if options.get("weights") is not None:
        options["weights"] = dataset.named_weights(options["weights"])
    return options


def check_not_put_together(options: Mapping[str, Any]) -> None:
    """Raise `BadParameter` for options that mixtures do not have."""
    for option in _OF_ONE_DATASET:
        if options.get(option) is not None:
            raise BadParameter(
                f"{option}= puts rows of one dataset together, not of a mixture: use pad= and max_length="
            )


def common_fields(sources: Sequence[Source]) -> dict[str, Field]:
    """The fields of a mixture. Those that differ between sources are not readable, and say why."""
    names = dict.fromkeys(name for source in sources for name in source.names)
    fields = {name: _common_field(name, sources) for name in names}
    first = tuple(source.name for source in sources)
    return fields | {SOURCE: Field(SOURCE, "other", (), "int64", True, None, class_names=first)}


def _common_field(name: str, sources: Sequence[Source]) -> Field:
    having = {source.name: source.dataset.fields[source.names[name]] for source in sources if name in source.names}
    first_source, first = next(iter(having.items()))
    lacking = [source for source in sources if name not in source.names]
    # Column indices may be integers of different size. Rows that are sparse in some sources are mixed as dense arrays.
    kinds = {one.index_dtype for one in having.values()}
    widest = None if None in kinds else max(kinds, key=lambda kind: np.dtype(kind).itemsize)
    found = replace(first, name=name, index_dtype=widest)
    if lacking:
        return replace(
            found,
            readable=False,
            reason=f"the source {lacking[0].name!r} has no such field; if it has another name there, use "
            f"fields={{{lacking[0].name!r}: {{'its name': {name!r}}}}}",
        )
    for source, one in having.items():
        if not one.readable:
            return replace(found, readable=False, reason=f"source {source!r}: {one.reason}")
        if (one.dtype, one.shape, one.ragged) != (first.dtype, first.shape, first.ragged):
            return replace(
                found,
                readable=False,
                reason=f"it is {_kind(first)} in the source {first_source!r}, but {_kind(one)} in {source!r}",
            )
    classes: tuple[str, ...] = ()
    for source, one in having.items():
        shorter, longer = sorted((classes, one.class_names or ()), key=len)
        if longer[: len(shorter)] != shorter:
            pairs = enumerate(zip(shorter, longer, strict=False))
            differing = next(number for number, (one_name, other) in pairs if one_name != other)
            return replace(
                found,
                readable=False,
                reason=f"class {differing} is {shorter[differing]!r} in one source, but {longer[differing]!r} in "
                f"another (one of them is {source!r})",
            )
        classes = longer
    return replace(found, class_names=classes or None)


def _kind(field: Field) -> str:
    return f"{field.dtype}{list(field.shape)}" + (" of rows that differ in length" if field.ragged else "")
