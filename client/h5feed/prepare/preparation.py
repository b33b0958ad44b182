"""What a model is given of a batch: inputs, targets and weights, scaled and augmented.

Everything that users of ``ImageDataGenerator.flow_from_directory`` rely on, for batches that come from a server. It
runs on the thread that asks for the batch, one batch after the other: a transform need not be safe for threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Names
from typing import Any

import numpy as np
import numpy.typing as npt

from ..batch import Batch
from ..buffers import BufferPool
from ..errors import BadParameter, UnsupportedField
from ..options import ClassMode, FieldNames, Statistic
from ..remote_dataset import RemoteDataset
from ..suggestions import no_field
from .labels import CLASS_MODES, Labels, no_label, unserved
from .scale import scale_of
from .transform import adapted, generator_of

POOL_BYTES = 256 << 20
"""Bytes: bound on the recycled buffers that scaled inputs lie in; beyond it they get memory of their own."""


class Preparation:
    """Makes ``(x,)``, ``(x, y)`` or ``(x, y, sample_weight)`` of a batch.

    Parameters
    ----------
    dataset : RemoteDataset
    split : str
        Statistics that are asked of the server are those of the training rows; only ``"all"`` has its own.
    x, y : str, list, tuple or dict of str, optional
        Fields. One gives an array; a list a dict by field name, a tuple a tuple, a dict ``{name: field}`` a dict by
        these names. Default: the input and the label fields, without those that the other options name. ``y=[]``:
        no targets.
    sample_weight : str, optional
        Field of one weight a row; it is multiplied by the weight 0 of the rows that pad a tail.
    class_mode : str or None
        What is made of a label field with one value a row, text, or one-hot rows:

        - ``"auto"``: as it is stored: one-hot rows stay one-hot, for ``categorical_crossentropy``, and numbers stay
          numbers, (rows,), for ``sparse_categorical_crossentropy``. Text becomes the number of its class.
        - ``"int"`` (or ``"sparse"``): the number of the class, (rows,): of one-hot rows the position of the 1, of text
          its place among all texts, sorted. What holds no classes (floats, masks, several labels a row) stays as it is
          stored.
        - ``"categorical"``: one-hot, (rows, classes) float32; rows of several numbers are only made float32.
        - ``"binary"``: 0.0 or 1.0, (rows,) float32.
        - ``"input"``: the inputs themselves, for autoencoders.
        - ``"raw"``: as it is stored.
        - ``None``: no targets.
    rescale : float or dict of str to float, optional
        Factor for the inputs; a dict gives one by field name, others stay as they are.
    mean, std : number, array, ``"server"`` or dict by field name, optional
        Subtracted from, and divided into, the rescaled inputs: ``(x * rescale - mean) / std``. An array is one value a
        channel, or whatever else broadcasts against a sample. ``"server"``: as the server counted over the training
        rows, per channel where the field has channels. A spread of 0 counts as 1.
    transform : callable, optional
        Augments what was scaled: ``f(x)``, ``f(x, y)``, ``f(x, y, rng)``, a Keras layer (called on x as in training,
        its random state set from `rng` before), or an `ImageDataGenerator`, which treats each image as its ``flow``
        does. A function of y too returns (x, y) or (x, y, sample_weight). `rng` is a `numpy.random.Generator` that
        depends on (seed, epoch, batch, shard) alone. It may write into what it is given. With ``class_mode="input"``
        it sees no y, unless it returns one.
    seed, shard : int
    split_options : mapping, optional
        Those of `Dataset.splits`.

    Attributes
    ----------
    fields : list of str
        What to ask the server for.
    inputs : list of str
        Those among them that make x.
    targets : list of str
        Those among them that make y.
    labels : Labels or None
        How the targets are made, where they are one field.
    no_targets : str or None
        Why there are none although some were expected, and how to name them.

    Raises
    ------
    FieldNotFound
    UnsupportedField
        One that is named cannot be served; the message says why.
    BadParameter
        An option that cannot be right for this dataset.

    Numbers are made float32 only where `rescale`, `mean` or `std` ask for it. Arrays of the batch are never written to.
    """

    def __init__(
        self,
        dataset: RemoteDataset,
        split: str = "all",
        *,
        x: FieldNames | None = None,
        y: FieldNames | None = None,
        sample_weight: str | None = None,
        class_mode: ClassMode | None = "auto",
        rescale: float | Mapping[str, float] | None = None,
        mean: Statistic | Mapping[str, Statistic] | None = None,
        std: Statistic | Mapping[str, Statistic] | None = None,
        transform: Any = None,
        seed: int = 0,
        shard: int = 0,
        split_options: Mapping[str, Any] | None = None,
    ) -> None:
        if class_mode is not None and class_mode not in CLASS_MODES:
            raise BadParameter(f"class_mode={class_mode!r} must be {', '.join(map(repr, CLASS_MODES))} or None")
        no_targets = class_mode in (None, "input")
        # What is named for one purpose is not taken for the other by default: a target among the inputs is no task.
        self._x = _Fields(dataset, "input", x, (*(() if no_targets else _names(y)), *_names(sample_weight)))
        self._y = _Fields(dataset, "label", [] if no_targets else y, (*_names(x), *_names(sample_weight)))
        self._weight = sample_weight
        self.inputs, self.targets = self._x.names, self._y.names
        if not self._x.names:
            why = unserved(dataset, "input")
            raise BadParameter(f"dataset {dataset.name!r} has no input field{why and ': '}{why}: name one with x=")
        for name in self._x.names:
            if dataset.fields[name].dtype == "string":
                raise BadParameter(f"the field {name!r} is text: a model takes numbers")
        wanted = [*self._x.names, *self._y.names, *([sample_weight] if sample_weight else [])]
        self.fields = list(dict.fromkeys(wanted))
        _check_known(dataset, self.fields)
        self._is_autoencoder = class_mode == "input"
        self._labels = {name: Labels(dataset, name, class_mode or "auto") for name in self._y.names}
        self.labels = next(iter(self._labels.values())) if len(self._labels) == 1 else None
        expected = y is None and not no_targets and not self._y.names
        self.no_targets = no_label(dataset, self._x.names) if expected else None
        self._scales = {
            name: scale
            for name in self._x.names
            if (scale := scale_of(dataset, name, split, rescale, mean, std, split_options or {})) is not None
        }
        self._pool = BufferPool(POOL_BYTES)
        self._transform = None if transform is None else adapted(transform)
        self._writes = self._transform is not None and self._transform.writes
        self._seed, self._shard = seed, shard

    def __call__(self, batch: Batch, epoch: int | None = None) -> tuple[Any, ...]:
        """What the model is given.

        Parameters
        ----------
        batch : Batch
            With the `fields`.
        epoch : int, optional
            Statistic of the pass, for the augmentation; default: the batch's own, which is 0 in every unshuffled pass.
        """
        x = self._x.arranged({name: self._input(batch, name) for name in self._x.names})
        y = self._y.arranged({name: self._target(batch, labels) for name, labels in self._labels.items()})
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

    def _input(self, batch: Batch, name: str) -> npt.NDArray[Any]:
        stored, scale = batch[name], self._scales.get(name)
        if scale is None and not self._writes:
            return stored
        # Fresh memory would cost as much as the arithmetic. A transform gets an array that nobody else sees.
        nbytes = stored.nbytes if scale is None else 4 * stored.size
        own = self._pool.lease_or_new(nbytes).view(stored.dtype if scale is None else np.float32).reshape(stored.shape)
        if scale is None:
            own[...] = stored
        else:
            scale(stored, own)
        return own

    def _target(self, batch: Batch, labels: Labels) -> npt.NDArray[Any]:
        targets = labels.targets(batch)
        return targets.copy() if self._writes else targets

    def _weight_of(self, batch: Batch) -> npt.NDArray[Any] | None:
        if self._weight is None:
            return batch.weight
        weight = batch[self._weight].astype(np.float32)
        if weight.ndim == 2 and weight.shape[1] == 1:
            weight = weight[:, 0]
        if batch.weight is not None:
            # weight: (rows, …) – of series there may be one for each step
            weight *= batch.weight.reshape(-1, *[1] * (weight.ndim - 1))
        return weight


class _Fields:
    """Some fields, and how their arrays are handed to a model."""

    def __init__(self, dataset: RemoteDataset, role: str, chosen: FieldNames | None, others: Names[str]) -> None:
        if chosen is None:
            known = dataset.fields_of_role(role) or _only_text(dataset, role)
            chosen = [name for name in known if name not in others]
        self.names = _names(chosen)
        self._keys = list(chosen) if isinstance(chosen, Mapping) else None
        self._as_tuple = isinstance(chosen, tuple)
        _check_known(dataset, self.names)

    def arranged(self, arrays: Mapping[str, npt.NDArray[Any]]) -> Any:
        """None, an array, a tuple or a dict."""
        if self._keys is not None:
            return {key: arrays[name] for key, name in zip(self._keys, self.names, strict=True)}
        if len(self.names) <= 1:
            return next(iter(arrays.values()), None)
        return tuple(arrays[name] for name in self.names) if self._as_tuple else dict(arrays)


def _names(chosen: FieldNames | None) -> list[str]:
    if chosen is None:
        return []
    if isinstance(chosen, Mapping):
        return list(chosen.values())
    return [chosen] if isinstance(chosen, str) else list(chosen)


def _only_text(dataset: RemoteDataset, role: str) -> list[str]:
    """A label that is text serves where no numbers do; an input that is text needs a model of its own."""
    texts = [
        f.name for f in dataset.fields.values() if f.role == role == "label" and f.readable and f.dtype == "string"
    ]
    return texts[:1]


def _check_known(dataset: RemoteDataset, names: list[str]) -> None:
    for name in names:
        if name not in dataset.fields:
            raise no_field(name, dataset.fields, f"{dataset.name!r} has no field")
        field = dataset.fields[name]
        if not field.readable:
            raise UnsupportedField(f"the field {name!r} of {dataset.name!r} cannot be served: {field.reason}")
