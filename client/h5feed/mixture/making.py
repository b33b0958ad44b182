"""`mix`, which makes mixtures."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, get_args

from ..errors import BadParameter
from ..mixing import Parts, Stop
from ..suggestions import did_you_mean
from .mixture import Mixture
from .sources import Source, datasets_of, names_in, options_in
from .weights import ChangingWeights, Schedule, Weights, checked_weights


def mix(
    sources: Mapping[str, Any] | Iterable[Any],
    *,
    weights: Weights | ChangingWeights | None = None,
    temperature: float | None = None,
    round_robin: bool = False,
    mixed: bool = True,
    stop: Stop | None = None,
    epoch_rows: int | None = None,
    fields: Mapping[str, Mapping[str, str]] | None = None,
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> Mixture:
    """Mix datasets, of one server or of several. ::

        mixture = h5feed.mix([(photos, 0.7), (drawings, 0.3)])
        train = mixture.sequence("train", batch_size=64, shuffle=True, val=0.1)

    The n-th sample that comes from a source is the n-th of its own order. Which source a sample comes from depends only
    on the weights, the seed, the epoch and the number of the sample. After every 1,000 samples, the number of samples
    of each source is within one of its weight times all samples so far; in between, sources are shuffled.

    Parameters
    ----------
    sources : list or mapping
        Datasets, or pairs of a dataset and its weight. In a mapping, the keys are the names of the sources; else, a
        source has the name of its dataset. See also `Feed.mix`, which takes names of datasets.
    weights : mapping or sequence of float, optional
        The weight of each source, by name or in their order; only their ratios matter. Or weights that change: a
        function of the epoch that returns them, or a table such as ``{0: [0.9, 0.1], 10: [0.5, 0.5]}``, whose keys are
        the epochs from which on they apply. Such weights need `epoch_rows`, and may be 0. A function must always return
        the same for the same epoch.
    temperature : float, optional
        Weights in proportion to ``rows ** (1 / temperature)``: 1 is in proportion to the rows, which is the default;
        larger values are closer to equal weights.
    round_robin : bool
        Sources take turns.
    mixed : bool
        False: all rows of a batch come from one source. Numbers are then exact for batches, not for samples.
    stop : ``"first"`` or ``"all"``, optional
        When an epoch ends. ``"first"``, the default: before a source would have to repeat a row. ``"all"``: when each
        row of every source has come at least once; sources that end earlier start another pass of their own, in a new
        order. With weights in proportion to the rows, both deliver each row exactly once.
    epoch_rows : int, optional
        Instead of `stop`, the number of rows of an epoch. If loops shuffle, each epoch continues the passes over the
        sources where the previous epoch ended, so that no row is left out.
    fields : mapping, optional
        New names for the fields of a source: ``{"photos": {"img": "image"}}``. A mixture has the fields that have the
        same name, dtype and shape in all sources.
    options : mapping, optional
        Options of `Dataset.batches` for single sources, instead of those of the loop:
        ``{"photos": {"where": "label < 10", "split": "all"}}``.

    Raises
    ------
    BadParameter
        Options contradict one another, or there is no such source.
    FieldNotFound
        `fields` names a field that a source does not have.
    """
    named, given = datasets_of(sources)
    if given is not None:
        if weights is not None:
            raise BadParameter(f"weights={weights!r}, but the sources have weights already: give one of the two")
        weights = given
    chosen = [
        option
        for option, is_given in (
            ("weights", weights is not None),
            ("temperature", temperature is not None),
            ("round_robin", round_robin),
        )
        if is_given
    ]
    if len(chosen) > 1:
        raise BadParameter(f"{' and '.join(chosen)} contradict each other: give one of them")
    if temperature is not None and not (isinstance(temperature, Real) and temperature > 0):
        raise BadParameter(f"temperature={temperature!r} must be a number above 0: 1 is in proportion to the rows")
    if stop is not None and stop not in get_args(Stop):
        raise BadParameter(f"stop={stop!r} must be 'first' or 'all'")
    if stop is not None and epoch_rows is not None:
        raise BadParameter(f"stop={stop!r} and epoch_rows={epoch_rows} contradict each other: give one of them")
    if epoch_rows is not None and not (isinstance(epoch_rows, int) and epoch_rows >= 1):
        raise BadParameter(f"epoch_rows={epoch_rows!r} must be a number of rows, 1 or more")
    for option, by_name in (("fields", fields), ("options", options)):
        for name in by_name or {}:
            if name not in named:
                raise BadParameter(f"{option}: there is no source {name!r}: {did_you_mean(name, named)}")
    made = [
        Source(
            name,
            dataset,
            names_in(name, dataset, (fields or {}).get(name, {})),
            options_in(name, dataset, (options or {}).get(name, {})),
        )
        for name, dataset in named.items()
    ]
    shares: Parts | Schedule | float | None
    if round_robin:
        shares = None
    elif weights is None:
        shares = 1.0 if temperature is None else float(temperature)
    elif callable(weights) or (isinstance(weights, Mapping) and all(isinstance(key, int) for key in weights)):
        shares = Schedule(tuple(named), weights)  # type: ignore[arg-type]
        if epoch_rows is None:
            raise BadParameter("weights that change need epoch_rows=: else epochs would differ in length")
    else:
        shares = checked_weights(tuple(named), weights, "weights")  # type: ignore[arg-type]
    return Mixture(made, shares, mixed, None if epoch_rows is not None else stop or "first", epoch_rows)
