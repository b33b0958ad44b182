"""What the names of arrays say about them: words for labels, targets, inputs, weights and indices."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from .split_names import SPLIT_WORDS

Says = Literal["weight", "label", "target", "index", "input", "nothing"]
"""``label``: the field to predict. ``target``: the same, if no other field is a ``label``, and each row is several
numbers: masks, boxes, depth maps."""

_CAMEL = re.compile(r"(?<=[a-z0-9])(?=[A-Z])")
_BETWEEN = re.compile(r"[^0-9A-Za-z]+")
_NUMBERED = re.compile(r"^([a-z]{3,})\d+$")


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_LABELS = _set("y label labels target targets class classes category categories groundtruth answer answers")
_TARGETS = _set(
    "mask masks seg segs segmentation segmentations segm annotation annotations annot depth depths disparity heatmap "
    "heatmaps instances bbox bboxes boxes keypoint keypoints landmark landmarks reconstruction"
)
_INPUTS = _set("x image images img imgs data input inputs feature features pixels")
_WEIGHTS = frozenset(("weight", "weights"))
_INDEX = _set(
    "id ids uid uuid index idx indices row rows picks file files filename filenames path paths name names time times "
    "date dates datetime timestamp timestamps offset offsets serial seq number lat lon latitude longitude start stop"
)
_PLACES = re.compile(r"^axis\d*$")
_HELPERS = _set(
    "num n nb nbr count counts cnt size sizes length lengths len confidence confidences conf score scores prob probs "
    "proba probability probabilities pred preds predicted prediction predictions logit logits weight weights valid "
    "validity missing description descriptions uid uuid file files filename filenames path paths time times date dates "
    "datetime timestamp timestamps"
)
"""In the name of a label, they show that the field is about the label: its confidence, for instance."""

_STANDS_FOR = _set("id ids index idx code codes name names text string")
"""In the name of a label, they show that the field is another form of the label."""

_SPLITS = _set("split splits fold folds subset partition usage ttv")

_MARKS = _set("mask masks is in flag idx index indices set split")
"""Together with a split word, they show that the field marks the rows of the split."""

_NOT_OF_PICTURES = _set(
    "attention input padding pad valid validity loss key token tokens sequence seq src causal missing nan observed "
    "sample obs observation observations state next action lm"
)
"""Next to these words, ``mask`` tells which parts of an input count, and ``depth`` is what a robot sees."""

_PAIRS: Mapping[str, frozenset[str]] = {
    "out": frozenset(("in",)),
    "output": frozenset(("in", "input")),
    "outputs": frozenset(("inputs", "input")),
    "hr": frozenset(("lr",)),
    "clean": frozenset(("noisy", "noise")),
    "sharp": frozenset(("blur", "blurred", "blurry")),
    "tgt": frozenset(("src",)),
    "values": frozenset(("classes",)),
}
"""Words that indicate a target if the name of another field has one of these words."""


@lru_cache(4096)
def words_of(name: str) -> tuple[str, ...]:
    """Split a name into words: ``trainSet_y`` → ``train``, ``set``, ``y``. Numbers at the end of words are left out."""
    words = [word.lower() for word in _BETWEEN.split(_CAMEL.sub("_", name)) if word]
    return tuple(match[1] if (match := _NUMBERED.match(word)) else word for word in words)


def says(name: str, *, single: bool) -> Says:
    """What the name of a field alone says about it.

    Parameters
    ----------
    name : str
    single : bool
        Whether a row is a single value.
    """
    words = words_of(name)
    if marks_split(name) and (single or "valid" not in words):
        return "index"
    if single and words and words[-1] in _WEIGHTS:
        return "weight"
    if any(word in _LABELS or word.startswith("gt") for word in words) or ("ground", "truth") in pairwise(words):
        return "label"
    if not single and _TARGETS.intersection(words) and not _NOT_OF_PICTURES.intersection(words):
        return "target"
    if is_running(name) and (single or words[-1] in ("id", "index", "idx", "picks")):
        return "index"
    if _INPUTS.intersection(words):
        return "input"
    return "nothing"


def is_running(name: str) -> bool:
    """Whether a name is that of an index, a position, a time, a file or a split, and so not of a class."""
    words = words_of(name)
    return marks_split(name) or any(word in _INDEX or word in _SPLITS or _PLACES.match(word) for word in words)


def marks_split(name: str) -> bool:
    """Whether a name is that of a field that marks the rows of a split: ``train_mask``, ``is_test``."""
    words = set(words_of(name))
    return bool(words & _MARKS) and bool(words & {*SPLIT_WORDS}) and words <= {*SPLIT_WORDS} | _MARKS


def helpers_in(name: str) -> tuple[int, str]:
    """Rank the name of a label: 0 (a label), 1 (another form of it) or 2 (about it), with the word that tells.

    The lowest rank among the fields is the label: ``label`` before ``label_id`` before ``label_confidence``.
    """
    for distance, helpers in ((2, _HELPERS), (1, _STANDS_FOR)):
        for word in words_of(name):
            if word in helpers:
                return distance, word
    return 0, ""


def has_meaning(name: str) -> bool:
    """Whether the name shows that a column is not just one of many features."""
    return says(name, single=True) in ("weight", "label", "index")


def target_of_pair(name: str, others: Iterable[str]) -> str | None:
    """The field among `others` that this one is the target of, as ``hr`` is of ``lr``; None if there is none."""
    wanted = frozenset[str]().union(*(_PAIRS.get(word, frozenset()) for word in words_of(name)))
    return next((other for other in others if other != name and wanted.intersection(words_of(other))), None)


def is_telling(name: str) -> bool:
    """Whether a name says anything about a field, alone or together with another name."""
    paired = frozenset(_PAIRS).union(*_PAIRS.values())
    return says(name, single=False) != "nothing" or is_running(name) or not paired.isdisjoint(words_of(name))


def is_coordinate(name: str, others: Iterable[str]) -> bool:
    """Whether ``x`` or ``y`` in a name is a coordinate: the names with the other two of x, y, z exist too."""
    words = words_of(name)
    if not {"x", "y"}.intersection(words):
        return False
    wanted = {tuple(axis if word in ("x", "y") else word for word in words) for axis in "xyz"}
    return wanted <= {words_of(other) for other in (name, *others)}
