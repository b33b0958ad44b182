"""Prepare batches for a model: inputs, targets and sample weights, scaled and augmented.

Covers what ``ImageDataGenerator.flow_from_directory`` offers. It runs on the thread that requests the batch, one batch
at a time, so a transform need not be thread-safe.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from collections.abc import Sequence as Names
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..buffers import BufferPool
from ..errors import BadParameter, UnsupportedField
from ..options import ClassMode, FieldNames, Statistic, field_names
from ..ragged import Layout, layout_of, padded_fields
from ..samples import Samples
from ..suggestions import no_field
from .labels import CLASS_MODES, Labels, no_label, unserved
from .scale import scale_of
from .transform import adapted, generator_of

POOL_BYTES = 256 << 20
"""Maximum size of the recycled buffers for scaled inputs, in bytes. Beyond it, new memory is allocated."""


_OF_LABELS = ("int", "sparse", "categorical", "binary")
"""Class modes that convert stored labels."""


class Preparation:
    """Makes ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)`` from a batch.

    Parameters
    ----------
    dataset : Samples
    split : str
        The split that the batches come from. Server statistics are those of the training rows, except for ``"all"``.
    x, y : str, list, tuple or dict of str, optional
        Fields. A single name gives an array, a list a dict by field name, a tuple a tuple, and a dict
        ``{name: field}`` a dict with these names. Default: all input and label fields not named by other options.
        ``y=[]``: no targets.
    sample_weight : str, optional
        Field with one weight per row. It is multiplied by the weight 0 of padding rows.
    class_mode : str or None
        How to make targets from a label field:

        - ``"auto"``: as stored. One-hot rows stay one-hot, for ``categorical_crossentropy``; numbers stay numbers,
          (rows,), for ``sparse_categorical_crossentropy``. Text becomes class numbers.
        - ``"int"`` (or ``"sparse"``): class numbers, (rows,): the position of the 1 in one-hot rows, the rank of a text
          among all sorted texts. Fields that do not hold classes (floats, masks, several labels per row) stay as
          stored.
        - ``"categorical"``: one-hot, (rows, classes) float32. Rows of several numbers are only cast to float32.
        - ``"binary"``: 0.0 or 1.0, (rows,) float32.
        - ``"input"``: the inputs themselves, for autoencoders.
        - ``"raw"``: as stored.
        - ``None``: no targets.
    classes : sequence of str or number, optional
        Classes of the label field, by name or stored value: they are numbered from 0 in this order, as
        ``flow_from_directory`` does. Other rows are an error here; loops select those of the classes with ``where``.
    rescale : float or dict of str to float, optional
        Factor for the inputs. A dict has one per field name; other fields stay as they are.
    mean, std : number, array, ``"server"`` or dict by field name, optional
        Normalise the rescaled inputs: ``(x * rescale - mean) / std``. An array has one value per channel, or any shape
        that broadcasts against a sample. ``"server"``: the server's statistics of the training rows, per channel if the
        field has channels. A standard deviation of 0 counts as 1.
    transform : callable, optional
        Augments the scaled batch: ``f(x)``, ``f(x, y)``, ``f(x, y, rng)``, a Keras layer (called on x in training mode,
        seeded from `rng`), or an `ImageDataGenerator`, applied to each image as in its ``flow``. A function of y
        returns (x, y) or (x, y, sample_weight). `rng` is a `numpy.random.Generator` that depends only on (seed, epoch,
        batch, shard). The function may modify its arguments in place. With ``class_mode="input"`` it gets no y, but may
        return one.
    seed, shard : int
    split_options : mapping, optional
        Options of `Dataset.splits`.
    ragged : mapping, optional
        The options ``pad``, ``pack`` … of `h5feed.ragged.layout_of`. Padded and packed fields are passed on as they
        are, without scaling, and so are the arrays that come with them: ``x=["tokens", "tokens.mask"]``.
    sparse : ``"dense"`` or ``"csr"``
        What inputs with sparse rows become. ``"csr"``: matrices of scipy, without scaling or transform.
    masks : mapping of str to str, optional
        Masks of samples of several rows, by name, with the fields that they belong to. They can be named in `x` and
        `sample_weight`.
    renamed : mapping of str to str, optional
        Fields that batches have under another name, too, by that name.
    cropping : mapping, optional
        The options ``crop``, ``crop_fields`` and ``crop_at`` of the batches, among others.

    Attributes
    ----------
    fields : list of str
        Fields to request from the server.
    inputs : list of str
        Those that make x.
    targets : list of str
        Those that make y.
    classes : sequence of str or number, or None
    labels : Labels or None
        Makes the targets, if they are a single field.
    transforms : bool
        Whether there is a transform.
    no_targets : str or None
        Why there are no targets although some were expected, and how to choose them.

    Raises
    ------
    FieldNotFound
    UnsupportedField
        A named field cannot be served; the message says why.
    BadParameter
        An option is not valid for this dataset.

    Numbers become float32 only with `rescale`, `mean` or `std`. Arrays of the batch are never written to.
    """

    def __init__(
        self,
        dataset: Samples,
        split: str = "all",
        *,
        x: FieldNames | None = None,
        y: FieldNames | None = None,
        sample_weight: str | None = None,
        class_mode: ClassMode | None = "auto",
        classes: Names[str | float] | None = None,
        rescale: float | Mapping[str, float] | None = None,
        mean: Statistic | Mapping[str, Statistic] | None = None,
        std: Statistic | Mapping[str, Statistic] | None = None,
        transform: Any = None,
        seed: int = 0,
        shard: int = 0,
        split_options: Mapping[str, Any] | None = None,
        ragged: Mapping[str, Any] | None = None,
        sparse: Literal["dense", "csr"] = "dense",
        masks: Mapping[str, str] | None = None,
        renamed: Mapping[str, str] | None = None,
        cropping: Mapping[str, Any] | None = None,
    ) -> None:
        if class_mode is not None and class_mode not in CLASS_MODES:
            raise BadParameter(f"class_mode={class_mode!r} must be one of {', '.join(map(repr, CLASS_MODES))} or None")
        no_targets = class_mode in (None, "input")
        # A field named as a target is not a default input, and vice versa: the model could just copy it.
        masks, renamed = masks or {}, renamed or {}
        layout = layout_of(dataset.fields, _chosen_lists(dataset, x, y, ragged or {}), ragged or {})
        self._derived = {} if layout is None else layout.derived
        self._laid = () if layout is None else layout.fields
        of_layout = _OfLayout(layout)
        known = {*dataset.fields, *renamed, *of_layout.derived}
        others = (*(() if no_targets else field_names(y)), *field_names(sample_weight))
        self._x = _Fields(dataset, "input", x, others, of_layout, {*known, *masks})
        self._y = _Fields(
            dataset, "label", [] if no_targets else y, (*field_names(x), *field_names(sample_weight)), of_layout, known
        )
        self._weight, self.inputs, self.targets = sample_weight, self._x.names, self._y.names
        if not self._x.names:
            why = unserved(dataset, "input")
            raise BadParameter(f"dataset {dataset.name!r} has no input field{why and ': '}{why}: choose one with x=")
        stored = [
            name for name in self._x.names if name not in masks and name not in self._derived and name not in self._laid
        ]
        for name in stored:
            if dataset.fields[renamed.get(name, name)].dtype == "string":
                raise BadParameter(
                    f"the field {name!r} is text, but a model needs numbers: pad={name!r} gives its bytes as numbers"
                )
        for name in [*stored, *(one for one in self._y.names if one not in self._derived and one not in self._laid)]:
            field = dataset.fields[renamed.get(name, name)]
            if field.ragged and field.dtype != "string":
                raise BadParameter(
                    f"rows of the field {name!r} differ in length: pad={name!r} makes arrays of equal shape, and "
                    "batches() returns the rows as they are"
                )
        wanted = [*self._x.names, *self._y.names, *([sample_weight] if sample_weight else [])]
        self.fields = of_layout.requested([masks.get(name, name) for name in wanted])
        _check_known(dataset, self.fields, known)
        self._is_autoencoder = class_mode == "input"
        self.classes = classes
        if classes is not None and self._y.names:
            label_of(dataset, {"x": x, "y": y, "sample_weight": sample_weight})
        self._labels = {
            name: Labels(dataset, name, class_mode or "auto", classes, renamed.get(name))
            for name in self._y.names
            if name not in self._derived and name not in self._laid
        }
        self.labels = next(iter(self._labels.values())) if len(self._labels) == 1 else None
        self._check_class_mode(class_mode, y)
        self.no_targets = None
        if y is None and not no_targets and not self._y.names:
            is_packed = layout is not None and layout.pack is not None
            self.no_targets = _no_packed_targets(self._laid) if is_packed else no_label(dataset, self._x.names)
        crops = dataset.crops({**(cropping or {}), "fields": self.fields})
        shapes = {name: dataset.fields[renamed.get(name, name)].shape for name in stored}
        if crops is not None:
            shapes = {name: crops.shape(name, shape) for name, shape in shapes.items()}
        self._scales = {
            name: scale
            for name, shape in shapes.items()
            if (
                scale := scale_of(
                    dataset, name, shape, split, rescale, mean, std, split_options or {}, renamed.get(name)
                )
            )
            is not None
        }
        self._check_scaled({"rescale": rescale, "mean": mean, "std": std}, known)
        self._pool = BufferPool(POOL_BYTES)
        self._transform = None if transform is None else adapted(transform)
        self.transforms = self._transform is not None
        self._writes = self._transform is not None and self._transform.writes
        self._seed, self._shard = seed, shard
        if sparse == "csr":
            self._check_sparse(dataset, renamed)

    def __call__(self, batch: Batch, epoch: int | None = None, pool: BufferPool | None = None) -> tuple[Any, ...]:
        """Prepare a batch for the model.

        Parameters
        ----------
        batch : Batch
            Must contain the `fields`.
        epoch : int, optional
            Number of the pass, to seed augmentation; default: the batch's own, which is 0 in all unshuffled passes.
        pool : BufferPool, optional
            Provides the memory of scaled inputs; default: a pool of its own.
        """
        pool = self._pool if pool is None else pool
        x = self._x.arranged({name: self._input(batch, name, pool) for name in self._x.names})
        y = self._y.arranged({name: self._target(batch, name) for name in self._y.names})
        weight = self._weight_of(batch)
        if self._transform is not None:
            rng = generator_of(self._seed, batch.epoch if epoch is None else epoch, batch.index, self._shard)
            x, y, *rest = self._transform.call(x, y, rng)
            if rest and weight is not None:
                weight = weight * np.asarray(rest[0])
            elif rest:
                weight = rest[0]
        if self._is_autoencoder and y is None:
            y = x
        if weight is not None:
            return x, y, weight
        return (x,) if y is None else (x, y)

    def check_prepares_as(self, before: Preparation) -> None:
        """Check that targets mean the same as those that `before` made of earlier rows.

        Raises
        ------
        BadParameter
        """
        for name, labels in self._labels.items():
            labels.check_numbered_as(before._labels[name])

    def _check_class_mode(self, class_mode: ClassMode | None, y: FieldNames | None) -> None:
        """Raise `BadParameter` if the class mode, or the choice of targets, would have no effect."""
        # With classes, y names the label that they are of.
        if class_mode in (None, "input") and field_names(y) and self.classes is None:
            what = "makes no targets" if class_mode is None else "makes the inputs the targets"
            raise BadParameter(f"y={y!r} has no effect: class_mode={class_mode!r} {what}. Leave out one of the two")
        if class_mode in _OF_LABELS and not self._labels:
            raise BadParameter(
                f"class_mode={class_mode!r} makes targets from labels, but there are none: name a field of one label "
                "per row with y=, or leave out class_mode"
            )

    def _check_scaled(self, options: Mapping[str, Any], known: Collection[str]) -> None:
        """Raise `BadParameter` if an option of scaling names no field, or would have no effect on it."""
        for option, value in options.items():
            named = value if isinstance(value, Mapping) else ()
            for name in named:
                if name not in known:
                    raise no_field(name, known, f"{option}=: there is no field")
                if name not in self._x.names:
                    raise BadParameter(
                        f"{option}= scales inputs, but {name!r} is not an input: name it in x=, or leave it out"
                    )
            for name in self._x.names:
                if name in self._laid and (name in named if isinstance(value, Mapping) else value is not None):
                    raise BadParameter(
                        f"{option}= cannot scale {name!r}, whose rows are padded or packed: use transform= for it, and "
                        f"name the fields to scale in a dict, such as {option}={{'image': …}}"
                    )
            unscaled = [name for name in named if value[name] is not None and name not in self._scales]
            if unscaled or (value is not None and not isinstance(value, Mapping) and not self._scales):
                what = unscaled[0] if unscaled else self._x.names[0]
                raise BadParameter(f"{option}= has no effect on {what!r}: only stored fields are scaled. Leave it out")

    def _check_sparse(self, dataset: Samples, renamed: Mapping[str, str]) -> None:
        """Raise `BadParameter` if sparse rows would have to be dense, or if there are none."""
        stored = {name: dataset.fields.get(renamed.get(name, name)) for name in self.fields}
        if not any(field is not None and field.index_dtype is not None for field in stored.values()):
            raise BadParameter(
                f"sparse='csr' has no effect: none of {', '.join(map(repr, self.fields))} has sparse rows. Leave it out"
            )
        for name in self.fields:
            field = stored[name]
            if field is None or field.index_dtype is None:
                continue
            if name not in self.inputs or name in self.targets or self._scales or self.transforms:
                raise BadParameter(
                    "sparse='csr' is only for inputs without rescale, mean, std and transform: use sparse='dense', or "
                    f"leave these out, and {name!r} out of y= and sample_weight="
                )

    def _input(self, batch: Batch, name: str, pool: BufferPool) -> Any:
        if name in batch.columns:
            return batch.sparse(name)
        stored, scale = batch[name], self._scales.get(name)
        if scale is None and not self._writes:
            return stored
        # Allocating memory would cost as much as the arithmetic. A transform gets a private array.
        nbytes = stored.nbytes if scale is None else 4 * stored.size
        own = pool.lease_or_new(nbytes).view(stored.dtype if scale is None else np.float32).reshape(stored.shape)
        if scale is None:
            own[...] = stored
        else:
            scale(stored, own)
        return own

    def _target(self, batch: Batch, name: str) -> npt.NDArray[Any]:
        labels = self._labels.get(name)
        targets = batch[name] if labels is None else labels.targets(batch)
        return targets.copy() if self._writes else targets

    def _weight_of(self, batch: Batch) -> npt.NDArray[Any] | None:
        if self._weight is None:
            return batch.weight
        weight = batch[self._weight].astype(np.float32)
        if weight.ndim == 2 and weight.shape[1] == 1:
            weight = weight[:, 0]
        if batch.weight is not None:
            # weight: (rows, …), for example one weight per time step
            weight *= batch.weight.reshape(-1, *[1] * (weight.ndim - 1))
        return weight


def label_of(dataset: Samples, preparing: Mapping[str, Any]) -> str:
    """The label field whose classes `classes` names, for these options of a `Preparation`.

    Raises
    ------
    BadParameter
        There is none, or more than one.
    """
    others = (*field_names(preparing.get("x")), *field_names(preparing.get("sample_weight")))
    names = _Fields(dataset, "label", preparing.get("y"), others, _OfLayout(None), dataset.fields).names
    if len(names) != 1:
        found = ", ".join(map(repr, names)) or "none"
        raise BadParameter(f"classes= needs one label field, but {dataset.name!r} has {found}: choose one with y=")
    return names[0]


class _OfLayout:
    """The arrays of padded or packed fields, which a model may get like stored fields."""

    def __init__(self, layout: Layout | None) -> None:
        self.layout = layout
        self.derived = {} if layout is None else layout.derived

    def defaults(self, dataset: Samples, role: str) -> list[str]:
        """The fields of a role that a model gets by default: those of equal length and those that are laid out."""
        if self.layout is None:
            return dataset.fields_of_role(role) or _only_text(dataset, role)
        laid = [name for name in self.layout.fields if (dataset.fields[name].role == "label") == (role == "label")]
        if self.layout.pack is not None:
            return laid
        names = {*dataset.fields_of_role(role), *laid}
        return [name for name in dataset.fields if name in names] or _only_text(dataset, role)

    def requested(self, names: Names[str]) -> list[str]:
        """The fields to request for these arrays."""
        wanted: list[str] = []
        for name in names:
            if name not in self.derived:
                wanted.append(name)
            elif (of := self.derived[name]) is not None:
                wanted.append(of)
            else:
                # Of all packed fields: any of them will do.
                assert self.layout is not None
                wanted += [] if any(one in names for one in self.layout.fields) else self.layout.fields[:1]
        return list(dict.fromkeys(wanted))


class _Fields:
    """The chosen fields of one role, and the structure in which a model gets them."""

    def __init__(
        self,
        dataset: Samples,
        role: str,
        chosen: FieldNames | None,
        others: Names[str],
        of_layout: _OfLayout,
        valid: Collection[str],
    ) -> None:
        if chosen is None:
            chosen = [name for name in of_layout.defaults(dataset, role) if name not in others]
        self.names = field_names(chosen)
        self._keys = list(chosen) if isinstance(chosen, Mapping) else None
        self._as_tuple = isinstance(chosen, tuple)
        _check_known(dataset, self.names, valid)

    def arranged(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
        """The arrays as None, an array, a tuple or a dict."""
        if self._keys is not None:
            return {key: arrays[name] for key, name in zip(self._keys, self.names, strict=True)}
        if len(self.names) <= 1:
            return next(iter(arrays.values()), None)
        return tuple(arrays[name] for name in self.names) if self._as_tuple else dict(arrays)


def padded_names(dataset: Samples, preparing: Mapping[str, Any]) -> list[str]:
    """What ``pad=True`` stands for, with these options of a `Preparation`.

    Raises
    ------
    BadParameter
        There are no lists and no text to pad.
    """
    chosen = _chosen_lists(dataset, preparing.get("x"), preparing.get("y"), {"pad": True})
    if preparing.get("x") is None and chosen is not None:
        others = {*field_names(preparing.get("y")), *field_names(preparing.get("sample_weight"))}
        chosen += [name for name in padded_fields(dataset.fields, None) if name not in others]
    layout = layout_of(dataset.fields, chosen, {"pad": True})
    return [] if layout is None else list(layout.fields)


def _chosen_lists(
    dataset: Samples, x: FieldNames | None, y: FieldNames | None, ragged: Mapping[str, Any]
) -> list[str] | None:
    """The fields that ``pad=True`` and ``pack`` are about; None: not said. Text targets stand for classes."""
    names = field_names(x) + [
        name for name in field_names(y) if name in dataset.fields and dataset.fields[name].dtype != "string"
    ]
    if not names:
        return None
    pad = ragged.get("pad")
    explicit = [] if pad in (None, True, False) else field_names(pad)
    of = [base for name in names if name not in dataset.fields and (base := name.rpartition(".")[0]) in dataset.fields]
    of_pack = [] if ragged.get("pack_by") is None else [str(ragged["pack_by"])]
    known = [*(name for name in names if name in dataset.fields), *of, *of_pack, *explicit]
    return list(dict.fromkeys(known))


def _only_text(dataset: Samples, role: str) -> list[str]:
    """A text field as the label, if there is no numeric one. Text is never a default input."""
    texts = [
        f.name for f in dataset.fields.values() if f.role == role == "label" and f.readable and f.dtype == "string"
    ]
    return texts[:1]


def _check_known(dataset: Samples, names: list[str], valid: Collection[str]) -> None:
    for name in names:
        if name not in valid:
            raise no_field(
                name, [*dataset.fields, *sorted({*valid} - {*dataset.fields})], f"{dataset.name!r} has no field"
            )
        field = dataset.fields.get(name)
        if field is not None and not field.readable:
            raise UnsupportedField(f"the field {name!r} of {dataset.name!r} cannot be served: {field.reason}")


def _no_packed_targets(packed: Names[str]) -> str:
    """The message for packed rows without targets: how to choose them."""
    if not packed:
        raise BadParameter("pack=: name the lists or text to pack with x=")
    return (
        "a packed row has no label, so batches have no targets: choose lists of equal length, such as "
        f"y={packed[0]!r}. Use y=[] if this is intended"
    )
