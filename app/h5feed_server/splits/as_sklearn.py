"""scikit-learn's splitters, reimplemented: the same rows for the same seed, in a tenth of the memory.

Each function makes the same calls to numpy's ``RandomState``, in the same order, as the scikit-learn class named in its
docstring, so the same seed gives the same rows. Tests compare the two. scikit-learn itself is not used because it
builds Python lists of all rows (1 GB for 10 million), and because importing it takes two seconds and 90 MB.

All functions work with *places*: positions 0 … n-1 in the sequence of rows to divide, not row ids.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Codes = npt.NDArray[np.unsignedinteger]
Indices = npt.NDArray[np.int32]
"""int32 is enough: more rows are divided by `by_hash`."""

MAX_TABLE_BYTES = 64 << 20
"""Limit on the (groups, classes) table of `stratified_group_fold`, in bytes."""

_BLOCK = 1 << 17
"""Rows processed at a time, which bounds temporary arrays."""


class TooFew(ValueError):
    """A class has too few rows, or there are too few groups, for the requested split.

    Attributes
    ----------
    code : int or None
        Code of the class; None if the error is not about a single class.
    """

    def __init__(self, reason: str, code: int | None = None) -> None:
        super().__init__(reason)
        self.code = code


def shuffle_split(n: int, test: int, seed: int) -> tuple[Indices, Indices]:
    """``train_test_split`` without classes (`ShuffleSplit`): places of train and test, in scikit-learn's order.

    Parameters
    ----------
    n : int
        Rows to divide.
    test : int
        Rows of the test side.
    """
    places = np.arange(n, dtype=np.int32)
    np.random.RandomState(seed).shuffle(places)
    return places[test:], places[:test]


def stratified_split(codes: Codes, test: int, seed: int, *, ordered: bool = True) -> tuple[Indices, Indices]:
    """``train_test_split`` with `stratify` (`StratifiedShuffleSplit`): places of train and test.

    Parameters
    ----------
    codes : (n,) unsigned int
        Class of each row.
    test : int
        Rows of the test side.
    ordered : bool
        Return train in scikit-learn's order, not only with the same rows. Test is never in that order.

    Raises
    ------
    TooFew
        A class has a single row, or one side has fewer rows than there are classes.
    """
    grouped, starts = group(codes)
    counts = np.diff(starts)
    present = np.flatnonzero(counts)
    random = np.random.RandomState(seed)
    try:
        of_train, of_test = class_shares(counts[present], test, random)
    except TooFew as error:
        raise TooFew(str(error), None if error.code is None else int(present[error.code])) from None
    held = []
    end = 0
    for start, count, left, taken in zip(starts[present], counts[present], of_train, of_test, strict=True):
        own = grouped[start : start + count]
        random.shuffle(own)
        held.append(own[left : left + taken].copy())
        # Compact the train rows at the front of the same array. The rows overwritten here are already copied.
        grouped[end : end + left] = own[:left]
        end += left
    rest = grouped[:end]
    if ordered:
        random.shuffle(rest)
    return rest, np.concatenate(held)


def class_shares(
    counts: npt.NDArray[np.int64], test: int, random: np.random.RandomState
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Rows of each class in train and test, for `stratified_split`.

    Parameters
    ----------
    counts : (classes,) int64
        Rows of each class, all above 0.
    test : int
        Rows of the test side.

    Raises
    ------
    TooFew
        See `stratified_split`; `TooFew.code` is a position in `counts`.
    """
    train = int(counts.sum()) - test
    if counts.min() < 2:
        raise TooFew("has only 1 row, and needs at least 2, one for each side", int(counts.argmin()))
    if min(train, test) < len(counts):
        raise TooFew(f"{len(counts)} classes do not fit into {min(train, test)} rows")
    of_train = _approximate_mode(counts, train, random)
    return of_train, _approximate_mode(counts - of_train, test, random)


def fold_of(n: int, folds: int, fold: int, seed: int | None) -> Indices:
    """`KFold`: places of the test side of one fold. With `seed` None, rows are not shuffled."""
    places = np.arange(n, dtype=np.int32)
    if seed is not None:
        np.random.RandomState(seed).shuffle(places)
    size, longer = divmod(n, folds)
    start = fold * size + min(fold, longer)
    return places[start : start + size + (fold < longer)]


def stratified_fold(codes: Codes, folds: int, fold: int, seed: int | None) -> Indices:
    """`StratifiedKFold`: places of the test side of one fold. With `seed` None, rows are not shuffled.

    Raises
    ------
    TooFew
        Every class has fewer rows than there are folds.
    """
    grouped, starts = group(codes)
    counts = np.diff(starts)
    if counts.max() < folds:
        raise TooFew(f"no class has as many rows as there are folds ({folds})")
    # Order classes by first appearance, as scikit-learn does. `grouped` is ascending within a class, so the first
    # place of each class is at its start.
    present = np.flatnonzero(counts)
    present = present[np.argsort(grouped[starts[present]])]
    ends = np.cumsum(counts[present])
    random = np.random.RandomState(seed)
    chosen = []
    for code, end in zip(present, ends, strict=True):
        # With rows sorted by class, this class takes positions begin … end-1. Positions are dealt to the folds in
        # turn; `dealt` counts how many each fold gets.
        begin = end - counts[code]
        numbers = np.arange(folds)
        dealt = (end - numbers + folds - 1) // folds - (begin - numbers + folds - 1) // folds
        of_class = np.arange(folds, dtype=np.uint16).repeat(dealt)
        if seed is not None:
            random.shuffle(of_class)
        chosen.append(grouped[starts[code] : starts[code + 1]][of_class == fold])
    return np.concatenate(chosen)


def group_split(groups: Codes, test: int, seed: int | None) -> tuple[Indices, Indices]:
    """`GroupShuffleSplit`: places of train and test, ascending. Each group is on one side only.

    Parameters
    ----------
    groups : (n,) unsigned int
        Group of each row.
    test : int
        Groups of the test side.
    seed : int or None
        With None, nothing is drawn: test takes the groups whose first rows come last.

    Raises
    ------
    TooFew
        No group would be left for train.
    """
    present, first = _present(groups)
    if test >= len(present):
        raise TooFew(f"taking {test} of {len(present)} groups leaves none for train")
    if seed is None:
        held = present[np.argsort(first)[len(present) - test :]]
    else:
        held = present[np.random.RandomState(seed).permutation(len(present))[:test]]
    return _sides(groups, held)


def group_fold(groups: Codes, folds: int, fold: int, seed: int | None) -> Indices:
    """`GroupKFold`: places of the test side of one fold. Each group is on one side only.

    Raises
    ------
    TooFew
        There are fewer groups than folds.
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
    """`StratifiedGroupKFold`: places of the test side of one fold. Each group is on one side only.

    Greedy: groups whose class counts vary most are assigned first, each to the fold that keeps the class shares of
    all folds most alike.

    Raises
    ------
    TooFew
        There are fewer groups than folds, every class has fewer rows than there are folds, or the table of groups by
        classes exceeds `MAX_TABLE_BYTES`.
    """
    present, _ = _present(groups)
    _check_groups(len(present), folds)
    counts = np.bincount(codes)
    classes = np.flatnonzero(counts)
    if counts.max() < folds:
        raise TooFew(f"no class has as many rows as there are folds ({folds})")
    if 8 * len(present) * len(classes) > MAX_TABLE_BYTES:
        raise TooFew(f"{len(present)} groups and {len(classes)} classes are too many to stratify groups")
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
    """Sort places by class with a counting sort; within a class they ascend.

    Parameters
    ----------
    codes : (n,) unsigned int
        Class of each row.

    Returns
    -------
    grouped : (n,) int32
        Places, class by class.
    starts : (classes + 1,) int64
        The places of class c are ``grouped[starts[c]:starts[c + 1]]``.
    """
    counts = np.zeros(int(codes.max()) + 1 if len(codes) else 0, np.int64)
    for start in range(0, len(codes), _BLOCK):
        counts += np.bincount(codes[start : start + _BLOCK], minlength=len(counts))
    starts = np.concatenate([[0], np.cumsum(counts)])
    grouped = np.empty(len(codes), np.int32)
    ends = starts[:-1].copy()
    # Sort in blocks: argsort returns int64, which takes twice the memory of `grouped` for all rows at once.
    for start in range(0, len(codes), _BLOCK):
        block = codes[start : start + _BLOCK]
        order = np.argsort(block, kind="stable")
        here = np.bincount(block, minlength=len(counts))
        # For each class: where its next row goes in `grouped`, minus where it starts in the sorted block.
        shift = ends - (np.cumsum(here) - here)
        grouped[np.arange(len(block)) + shift[block[order]]] = order + start
        ends += here
    return grouped, starts


def _present(groups: Codes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Groups that have rows, ascending, and the first place of each."""
    grouped, starts = group(groups)
    present = np.flatnonzero(np.diff(starts))
    return present, grouped[starts[present]].astype(np.int64)


def _sides(groups: Codes, held: npt.NDArray[np.int64]) -> tuple[Indices, Indices]:
    """Places outside and inside the groups `held`, both ascending."""
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
    # tried: (candidate fold, fold, class), the class counts of all folds if the group went to the candidate
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
    """How many of `draws` rows to take from each class, (classes,) int64.

    Each class gets its share, rounded down. The missing rows go to the largest remainders; ties are drawn at random,
    with the same random calls as scikit-learn's ``_approximate_mode``.
    """
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
