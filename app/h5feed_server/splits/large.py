"""Splits of datasets with more than `LISTED_ROWS` rows: found by a job in bounded memory, and kept as bits.

Each split is a file in the cache folder with a bit for each row of the dataset. Only those that requests need are in
memory.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import Overloaded, SplitImpossible, TooLarge
from h5feed.stored.array_file import dump_arrays, load_arrays
from h5feed.stored.byte_cache import ByteCache, CacheUsage

from ..cache_folder.folder import CacheFolder
from ..catalog.dataset import Dataset
from ..catalog.names import Key, key_of
from ..jobs.registry import Progress
from ..row_bits import LISTED_ROWS, Bits, RowBits, RowRuns, RowSet
from .as_sklearn import Codes, TooFew, class_shares
from .by_hash import Take, divide_by_hash
from .classes import Classes
from .compute import Division, Splits
from .describe import digest_of
from .labels import Strata
from .split_spec import SplitSpec

_ABOUT_BYTES = 2048
"""Rough size of what is known about splits, without their rows."""

_HASHING_SECONDS = 3600.0
"""How long a job waits until the content of the files is known: nothing on disk has a provisional name."""

_POLL_SECONDS = 0.1

_BLOCK = 1 << 18

_REFUSED = f"datasets of more than {LISTED_ROWS} rows"


class HashDivision(Division[Classes, Bits]):
    """Divides any number of rows by `divide_by_hash`. `draw` finds the rows of all splits but one.

    Attributes
    ----------
    rows : int
        Rows of the dataset.
    names : list of str
        The splits.
    rest : str
        The split that has all other rows.
    """

    def __init__(
        self,
        rows: int,
        spec: SplitSpec,
        strata: Strata[Classes] | None,
        advance: Callable[[int], None] = lambda rows: None,
    ) -> None:
        super().__init__(rows, spec, strata, None)
        asked = {"train": True, "val": spec.val is not None or spec.folds is not None, "test": spec.test is not None}
        self.names = [name for name, is_asked in asked.items() if is_asked]
        self.rest = "train" if spec.split_shuffle or spec.test is None else "test"
        self.rows = rows
        self._advance = advance

    def draw(self, labels: Classes | None) -> Mapping[str, Bits]:
        """See `Division.draw`."""
        self._check_folds()
        if labels is None:
            counts, blocks = np.array([self._rows]), self._one_class
        else:
            counts, blocks = labels.totals, labels.codes
        takes = [
            # Nobody takes what is left for the rest.
            take._replace(part="") if take.part == self.rest else take
            for take in self._takes(counts, labels)
            if take.part in self.names
        ]
        return divide_by_hash(self._rows, blocks, takes, self._seed, self._advance)

    def method(self, labels: Classes | None) -> str:
        """See `Division.method`."""
        if not self._spec.split_shuffle:
            return "by position"
        return "keyed hash within each class" if labels is not None else "keyed hash"

    def _one_class(self) -> Iterable[Codes]:
        zeros = np.zeros(min(_BLOCK, self._rows), np.uint8)
        for start in range(0, self._rows, _BLOCK):
            yield zeros[: self._rows - start]

    def _takes(self, counts: npt.NDArray[np.int64], labels: Classes | None) -> list[Take]:
        """Rows of each class in each split, in the order of the hash, or of positions."""
        if self._seed is None:
            return self._takes_by_position(counts, labels)
        test, left = np.zeros_like(counts), counts
        if self._test:
            left, test = self._shares(counts, self._test, labels)
        if self._spec.folds is not None:
            return [Take("test", test), *self._fold(left, labels, self._spec.folds, self._spec.fold or 0)]
        val = self._shares(left, self._val, labels)[1] if self._val else np.zeros_like(counts)
        return [Take("test", test), Take("val", val)]

    def _takes_by_position(self, counts: npt.NDArray[np.int64], labels: Classes | None) -> list[Take]:
        if labels is not None and self._test:
            raise SplitImpossible(
                f"split_shuffle=false takes test by position, so stratified folds of the other rows of {_REFUSED} "
                "cannot be made: leave out test, or use split_shuffle=true"
            )
        left = counts - self._test
        if self._spec.folds is not None:
            before, fold = self._fold(left, labels, self._spec.folds, self._spec.fold or 0)
            return [before, fold, Take("train", left - before.rows - fold.rows)]
        val = np.array([self._val])
        return [Take("train", left - val), Take("val", val)]

    def _shares(
        self, counts: npt.NDArray[np.int64], held: int, labels: Classes | None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """How many rows of each class are left, and how many are held out: as many as scikit-learn holds out."""
        if labels is None:
            return counts - held, np.array([held])
        of_train, _ = class_shares(counts, held, np.random.RandomState(self._spec.split_seed))
        return of_train, counts - of_train

    def _fold(self, counts: npt.NDArray[np.int64], labels: Classes | None, folds: int, fold: int) -> tuple[Take, Take]:
        """The rows before a fold, and those of the fold. Folds differ by at most one row, also of each class."""
        if labels is not None:
            if counts.max() < folds:
                raise TooFew(f"no class has as many rows as there are folds ({folds})")
            self._note_small_classes(labels, counts, folds)
        # With rows sorted by class, positions are dealt to the folds in turn, and each class is a range of positions.
        ends = np.cumsum(counts)
        # dealt: (classes, folds)
        numbers = np.arange(folds)
        dealt = (ends[:, None] - numbers + folds - 1) // folds
        dealt -= ((ends - counts)[:, None] - numbers + folds - 1) // folds
        return Take("train", dealt[:, :fold].sum(axis=1)), Take("val", dealt[:, fold])


class LargeSplits:
    """Finds and keeps the splits of datasets with more than `LISTED_ROWS` rows; one per process.

    Parameters
    ----------
    max_bytes : int
        Limit on the bits in memory.
    timeout : float
        Seconds to wait for another thread that reads the same.
    """

    def __init__(self, folder: CacheFolder, max_bytes: int, timeout: float) -> None:
        self._folder = folder
        self._known: ByteCache[dict[str, Any]] = ByteCache(1 << 20, timeout)
        self._bits: ByteCache[RowBits] = ByteCache(max_bytes, timeout)

    @property
    def usage(self) -> CacheUsage:
        """Of the bits in memory."""
        return self._bits.usage

    def drop_old(self, seconds: float) -> None:
        """Drop everything from memory that was not used for this many seconds."""
        self._known.drop_old(seconds)
        self._bits.drop_old(seconds)

    def has(self, dataset: Dataset, spec: SplitSpec) -> bool:
        """Whether the splits have been found, and are still in the cache folder."""
        name = _about_name(dataset, spec)
        about = self._known.find(name.here) or self._read_about(name)
        return about is not None and all(
            self._folder.has(_bits_name(dataset, spec, split).kept) for split in about["splits"]
        )

    def splits(self, dataset: Dataset, spec: SplitSpec) -> Splits[RowSet]:
        """The splits; their rows are loaded when they are needed.

        Raises
        ------
        Overloaded
            They are not in the cache folder any more.
        """
        if not spec.splits_rows:
            return Splits(
                {name: RowRuns(sorted(runs)) for name, runs in dataset.native.items()}, stored=(*dataset.native,)
            )
        name = _about_name(dataset, spec)

        def read() -> dict[str, Any]:
            if (about := self._read_about(name)) is None:
                raise _gone(dataset)
            return about

        about = self._known.get(name.here, read, lambda about: _ABOUT_BYTES)
        of_all = {key: value for key, value in about.items() if key != "splits"}
        loaded = _Loaded(about["splits"], lambda split: self._load(dataset, spec, split))
        return Splits(loaded, **{**of_all, "stored": ()})

    def digests(self, dataset: Dataset, spec: SplitSpec) -> dict[str, str]:
        """The digest of the row ids of each split, which are found with them."""
        about = self._read_about(_about_name(dataset, spec)) if spec.splits_rows else None
        return {} if about is None else dict(about["splits"])

    def divide(
        self, dataset: Dataset, spec: SplitSpec, strata: Strata[Classes] | None, advance: Callable[[int], None]
    ) -> None:
        """Find the splits, and store them. Takes time: about a minute for a billion rows.

        Advances by 3 times the rows of the dataset.

        Raises
        ------
        SplitImpossible
        TooLarge
            The cache folder cannot store them.
        """
        division = HashDivision(dataset.rows, spec, strata, advance)
        try:
            drawn = division.splits()
        except TooFew as error:
            raise SplitImpossible(str(error)) from None
        about = {item.name: getattr(drawn, item.name) for item in fields(drawn) if item.name != "rows"}
        digests, taken = {}, dict(drawn.rows)
        del drawn
        for name, own in bits_of_all(division, taken):
            digests[name] = digest_of(RowBits(own), dataset.rows)
            # As they are, without a copy.
            self._store(_bits_name(dataset, spec, name), own.data)
            advance(dataset.rows // len(division.names))
        about["splits"] = {name: digests[name] for name in division.names}
        self._store(_about_name(dataset, spec), dump_arrays(about, {}))

    def _load(self, dataset: Dataset, spec: SplitSpec, split: str) -> RowBits:
        name = _bits_name(dataset, spec, split)

        def read() -> RowBits:
            data = self._folder.find(name.kept)
            if data is None:
                raise _gone(dataset)
            return RowBits(np.frombuffer(data, np.uint8))

        return self._bits.get(name.here, read, lambda rows: rows.nbytes)

    def _read_about(self, name: Key) -> dict[str, Any] | None:
        data = self._folder.find(name.kept)
        return None if data is None else load_arrays(data)[0]

    def _store(self, name: Key, data: bytes | memoryview) -> None:
        kept = name.kept()
        if kept is not None:
            self._folder.put(kept, data)
        if not self._folder.has(name.kept):
            raise TooLarge(
                f"splits of {_REFUSED} are stored in the cache folder, which cannot be written (H5FEED_CACHE_DIR) "
                f"or has no space for {len(data)} bytes"
            )


class _Loaded(Mapping[str, RowSet]):
    """The rows of each split, loaded when they are needed."""

    def __init__(self, names: Iterable[str], load: Callable[[str], RowBits]) -> None:
        self._names = tuple(names)
        self._load = load

    def __getitem__(self, name: str) -> RowSet:
        if name not in self._names:
            raise KeyError(name)
        return self._load(name)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def wait_for_content(dataset: Dataset, progress: Progress) -> None:
    """Wait until all files of the dataset have been hashed.

    Raises
    ------
    Cancelled
    Overloaded
        It takes too long.
    """
    deadline = time.monotonic() + _HASHING_SECONDS
    while dataset.names.content is None:
        if time.monotonic() > deadline:
            raise Overloaded(f"the files of {dataset.name!r} have not been hashed yet", retry_after=60)
        progress.advance(0)
        time.sleep(_POLL_SECONDS)


def bits_of_all(division: HashDivision, drawn: dict[str, Bits]) -> Iterator[tuple[str, Bits]]:
    """The rows of all splits, and last those of the rest, in the memory of the others.

    Parameters
    ----------
    division : HashDivision
    drawn : dict of str to (⌈rows / 8⌉,) uint8
        What it drew. It is emptied, and its arrays are overwritten when the rest is asked for: a billion rows take 125
        MB for each split.
    """
    for name in division.names:
        if name != division.rest:
            yield name, drawn[name]
    _, first = drawn.popitem()
    while drawn:
        np.bitwise_or(first, drawn.popitem()[1], out=first)
    np.invert(first, out=first)
    if division.rows % 8:
        first[-1] &= 256 - (1 << (8 - division.rows % 8))
    yield division.rest, first


def _gone(dataset: Dataset) -> Overloaded:
    return Overloaded(f"the splits of {dataset.name!r} are no longer in the cache folder: ask again", retry_after=1)


def _about_name(dataset: Dataset, spec: SplitSpec) -> Key:
    return key_of("large/1", dataset.name, dataset.names, spec.model_dump_json())


def _bits_name(dataset: Dataset, spec: SplitSpec, split: str) -> Key:
    return key_of("bits/1", dataset.name, dataset.names, f"{spec.model_dump_json()} {split}")
