"""scikit-learn's ways to divide rows, to the row, in a tenth of its memory and without its import.

Each function draws from numpy's ``RandomState`` what the class that it is named after draws, in the same order, so that
the rows are the same for the same seed (tests compare them with scikit-learn itself). scikit-learn collects Python
lists of all rows (1 GB for 10 million), and loading it takes two seconds and 90 MB.

Functions take *places*: 0 … n-1 among the rows that are divided, in the order in which they are given.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.unsignedinteger]
Indices = npt.NDArray[np.int32]
"""int32: `MAX_SPLIT_ROWS` rows and no more are divided."""

MAX_TABLE_BYTES = 64 << 20
"""Bytes of the table of groups by classes that `stratified_group_fold` holds."""

_BLOCK = 1 << 17


class TooFew(ValueError):
    """A class, or the groups, are too few for what is asked.

    Attributes
    ----------
    code : int or None
        The class.
    """

    def __init__(self, reason: str, code: int | None = None) -> None:
        super().__init__(reason)
        self.code = code


def shuffle_split(n: int, test: int, seed: int) -> tuple[Indices, Indices]:
    """``train_test_split`` without classes (`ShuffleSplit`): train and test, in its order."""
    places = np.arange(n, dtype=np.int32)
    np.random.RandomState(seed).shuffle(places)
    return places[test:], places[:test]


def stratified_split(codes: Codes, test: int, seed: int, *, ordered: bool = True) -> tuple[Indices, Indices]:
    """``train_test_split`` with `stratify` (`StratifiedShuffleSplit`).

    Parameters
    ----------
    codes : (n,) unsigned int
    test : int
        Rows of the test side.
    ordered : bool
        Whether train must come in scikit-learn's order, and not only hold its rows: test never does.

    Raises
    ------
    TooFew
    """
    train = len(codes) - test
    grouped, starts = group(codes)
    counts = np.diff(starts)
    present = np.flatnonzero(counts)
    if counts[present].min() < 2:
        code = int(present[counts[present].argmin()])
        raise TooFew("has only 1 row, and needs 2 to lie on both sides", code)
    if min(train, test) < len(present):
        raise TooFew(f"{len(present)} classes do not fit into {min(train, test)} rows")
    random = np.random.RandomState(seed)
    of_train = _approximate_mode(counts[present], train, random)
    of_test = _approximate_mode(counts[present] - of_train, test, random)
    held = []
    end = 0
    for start, count, left, taken in zip(starts[present], counts[present], of_train, of_test, strict=True):
        own = grouped[start : start + count]
        random.shuffle(own)
        held.append(own[left : left + taken].copy())
        # Moved together at the front of the same memory, over what has been copied.
        grouped[end : end + left] = own[:left]
        end += left
    rest = grouped[:end]
    if ordered:
        random.shuffle(rest)
    return rest, np.concatenate(held)


def fold_of(n: int, folds: int, fold: int, seed: int | None) -> Indices:
    """`KFold`: places of the test side of a fold; `seed` None means that rows are not shuffled."""
    places = np.arange(n, dtype=np.int32)
    if seed is not None:
        np.random.RandomState(seed).shuffle(places)
    size, longer = divmod(n, folds)
    start = fold * size + min(fold, longer)
    return places[start : start + size + (fold < longer)]


def stratified_fold(codes: Codes, folds: int, fold: int, seed: int | None) -> Indices:
    """`StratifiedKFold`: places of the test side of a fold.

    Raises
    ------
    TooFew
    """
    grouped, starts = group(codes)
    counts = np.diff(starts)
    if counts.max() < folds:
        raise TooFew(f"no class has as many rows as there are folds ({folds})")
    # In the order in which classes come first; each class's first place leads its run.
    present = np.flatnonzero(counts)
    present = present[np.argsort(grouped[starts[present]])]
    ends = np.cumsum(counts[present])
    random = np.random.RandomState(seed)
    chosen = []
    for code, end in zip(present, ends, strict=True):
        # How many of the sorted classes' places begin … end-1 are dealt to each fold in turn.
        begin = end - counts[code]
        numbers = np.arange(folds)
        dealt = (end - numbers + folds - 1) // folds - (begin - numbers + folds - 1) // folds
        of_class = np.arange(folds, dtype=np.uint16).repeat(dealt)
        if seed is not None:
            random.shuffle(of_class)
        chosen.append(grouped[starts[code] : starts[code + 1]][of_class == fold])
    return np.concatenate(chosen)


def group_split(groups: Codes, test: int, seed: int | None) -> tuple[Indices, Indices]:
    """`GroupShuffleSplit`: train and test, ascending, with whole groups on one side.

    Parameters
    ----------
    groups : (n,) unsigned int
    test : int
        Groups of the test side.
    seed : int or None
        None: the groups that come last, by their first rows.

    Raises
    ------
    TooFew
    """
    present, first = _present(groups)
    if test >= len(present):
        raise TooFew(f"{test} groups of {len(present)} leave none for train")
    if seed is None:
        held = present[np.argsort(first)[len(present) - test :]]
    else:
        held = present[np.random.RandomState(seed).permutation(len(present))[:test]]
    return _sides(groups, held)


def group_fold(groups: Codes, folds: int, fold: int, seed: int | None) -> Indices:
    """`GroupKFold`: places of the test side of a fold, with whole groups on one side.

    Raises
    ------
    TooFew
    """
    present, _ = _present(groups)
    _check_groups(len(present), folds)
    if seed is not None:
        held = np.array_split(np.random.RandomState(seed).permutation(present), folds)[fold]
        return _sides(groups, held)[1]
    rows = np.bincount(groups)[present]
    heaviest = np.argsort(rows, kind="stable")[::-1]
    per_fold = np.zeros(folds)
    owner = np.empty(len(present), np.int64)
    for number in heaviest.tolist():
        lightest = int(np.argmin(per_fold))
        per_fold[lightest] += rows[number]
        owner[number] = lightest
    return _sides(groups, present[owner == fold])[1]


def stratified_group_fold(codes: Codes, groups: Codes, folds: int, fold: int, seed: int | None) -> Indices:
    """`StratifiedGroupKFold`: places of the test side of a fold.

    Groups of the most uneven classes are given out first, each to the fold in which the shares of the classes then
    differ least.

    Raises
    ------
    TooFew
    """
    present, _ = _present(groups)
    _check_groups(len(present), folds)
    counts = np.bincount(codes)
    classes = np.flatnonzero(counts)
    if counts.max() < folds:
        raise TooFew(f"no class has as many rows as there are folds ({folds})")
    if 8 * len(present) * len(classes) > MAX_TABLE_BYTES:
        raise TooFew(f"{len(present)} groups of {len(classes)} classes are too many to be weighed against each other")
    rank = np.zeros(len(counts), np.int64)
    rank[classes] = np.arange(len(classes))
    number = np.zeros(int(present[-1]) + 1, np.int64)
    number[present] = np.arange(len(present))
    table = np.zeros(len(present) * len(classes))
    for start in range(0, len(codes), _BLOCK):
        cells = number[groups[start : start + _BLOCK]] * len(classes) + rank[codes[start : start + _BLOCK]]
        table += np.bincount(cells, minlength=len(table))
    # per_group: (groups, classes)
    per_group = table.reshape(len(present), len(classes))
    order = np.arange(len(present))
    if seed is not None:
        np.random.RandomState(seed).shuffle(order)
        per_group = per_group[order]
    per_fold = np.zeros((folds, len(classes)))
    owner = np.empty(len(present), np.int64)
    for index in np.argsort(-np.std(per_group, axis=1), kind="stable").tolist():
        best = _best_fold(per_fold, counts[classes], per_group[index])
        per_fold[best] += per_group[index]
        owner[order[index]] = best
    return _sides(groups, present[owner == fold])[1]


def group(codes: Codes) -> tuple[Indices, npt.NDArray[np.int64]]:
    """Indices by class, ascending within each: a counting sort.

    Returns
    -------
    grouped : (n,) int32
    starts : (classes + 1,) int64
        Class c has ``grouped[starts[c]:starts[c + 1]]``.
    """
    counts = np.zeros(int(codes.max()) + 1 if len(codes) else 0, np.int64)
    for start in range(0, len(codes), _BLOCK):
        counts += np.bincount(codes[start : start + _BLOCK], minlength=len(counts))
    starts = np.concatenate([[0], np.cumsum(counts)])
    grouped = np.empty(len(codes), np.int32)
    ends = starts[:-1].copy()
    # In blocks: the order of all at once would be int64.
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        order = np.argsort(block, kind="stable")
        here = np.bincount(block, minlength=len(counts))
        # Where each class of this block begins, there and here.
        shift = ends - (np.cumsum(here) - here)
        grouped[np.arange(len(block)) + shift[block[order]]] = order + start
        ends += here
    return grouped, starts


def _present(groups: Codes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The groups that are there, ascending, and the first place of each."""
    grouped, starts = group(groups)
    present = np.flatnonzero(np.diff(starts))
    return present, grouped[starts[present]].astype(np.int64)


def _sides(groups: Codes, held: npt.NDArray[np.int64]) -> tuple[Indices, Indices]:
    is_held = np.zeros(int(groups.max()) + 1, np.bool_)
    is_held[held] = True
    mask = is_held[groups]
    places = np.arange(len(groups), dtype=np.int32)
    return places[~mask], places[mask]


def _check_groups(groups: int, folds: int) -> None:
    if groups < folds:
        raise TooFew(f"{groups} groups are fewer than {folds} folds")


def _best_fold(
    per_fold: npt.NDArray[np.float64], counts: npt.NDArray[np.int64], group_counts: npt.NDArray[np.float64]
) -> int:
    folds = len(per_fold)
    # tried: (candidate fold, fold, class)
    tried = np.repeat(per_fold[None], folds, axis=0)
    tried[np.arange(folds), np.arange(folds)] += group_counts
    uneven = np.mean(np.std(tried / counts.reshape(1, 1, -1), axis=1), axis=1)
    rows = per_fold.sum(axis=1)
    best = 0
    for fold in range(1, folds):
        if uneven[fold] < uneven[best] or (np.isclose(uneven[fold], uneven[best]) and rows[fold] < rows[best]):
            best = fold
    return best


def _approximate_mode(
    counts: npt.NDArray[np.int64], draws: int, random: np.random.RandomState
) -> npt.NDArray[np.int64]:
    """So many of each class that `draws` are drawn in their shares: the rounding, and what is drawn for ties."""
    exact = counts / counts.sum() * draws
    floored = np.floor(exact)
    missing = int(draws - floored.sum())
    if missing > 0:
        remainders = exact - floored
        for value in np.sort(np.unique(remainders))[::-1]:
            (tied,) = np.where(remainders == value)
            add = min(len(tied), missing)
            floored[random.choice(tied, size=add, replace=False)] += 1
            missing -= add
            if missing == 0:
                break
    return np.asarray(floored, np.int64)
