"""What names of arrays say of them: the words that data sets use for targets, inputs, weights and running numbers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import pairwise
from typing import Literal

from .split_names import SPLIT_WORDS

Says = Literal["weight", "label", "target", "index", "input", "nothing"]
"""``label``: what is to be learnt. ``target``: the same, where no other field says ``label``, and a row is several
numbers: masks, boxes, maps of depth."""

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
"""In the name of a label, they make it something that is said of one."""

_STANDS_FOR = _set("id ids index idx code codes name names text string")
"""In the name of a label, they make it another way to say one."""

_SPLITS = _set("split splits fold folds subset partition usage ttv")

_MARKS = _set("mask masks is in flag idx index indices set split")
"""Beside a split's word, these mark its rows."""

_NOT_OF_PICTURES = _set(
    "attention input padding pad valid validity loss key token tokens sequence seq src causal missing nan observed "
    "sample obs observation observations state next action lm"
)
"""Beside these words a mask says what counts of an input, and depth is what a robot sees."""

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
"""Words that say target where another field has one of these."""


@lru_cache(4096)
def words_of(name: str) -> tuple[str, ...]:
    """``trainSet_y`` → ``train``, ``set``, ``y``; numbers behind a word are left out."""
    words = [word.lower() for word in _BETWEEN.split(_CAMEL.sub("_", name)) if word]
    return tuple(match[1] if (match := _NUMBERED.match(word)) else word for word in words)


def says(name: str, *, single: bool) -> Says:
    """What a name alone says of a field.

    Parameters
    ----------
    single : bool
        Whether a row is one value.
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
    """Whether it is the name of a running number, a place, a file or a split, which is no class."""
    words = words_of(name)
    return marks_split(name) or any(word in _INDEX or word in _SPLITS or _PLACES.match(word) for word in words)


def marks_split(name: str) -> bool:
    """Whether it is the name of what says which rows are of a split: ``train_mask``, ``is_test``."""
    words = set(words_of(name))
    return bool(words & _MARKS) and bool(words & {*SPLIT_WORDS}) and words <= {*SPLIT_WORDS} | _MARKS


def helpers_in(name: str) -> tuple[int, str]:
    """How far a label's name is from saying no more than that, 0 … 2, and the word that tells.

    ``label`` is the label beside ``label_id``, and that is beside ``label_confidence``.
    """
    for distance, helpers in ((2, _HELPERS), (1, _STANDS_FOR)):
        for word in words_of(name):
            if word in helpers:
                return distance, word
    return 0, ""


def has_meaning(name: str) -> bool:
    """Whether a column of that name, among many, is something else than one more feature."""
    return says(name, single=True) in ("weight", "label", "index")


def target_of_pair(name: str, others: Iterable[str]) -> str | None:
    """The field that this one is the target to, as ``hr`` is to ``lr``; None where it is none."""
    wanted = frozenset[str]().union(*(_PAIRS.get(word, frozenset()) for word in words_of(name)))
    return next((other for other in others if other != name and wanted.intersection(words_of(other))), None)


def is_telling(name: str) -> bool:
    """Whether a name says anything of a field, alone or beside another."""
    paired = frozenset(_PAIRS).union(*_PAIRS.values())
    return says(name, single=False) != "nothing" or is_running(name) or not paired.isdisjoint(words_of(name))


def is_coordinate(name: str, others: Iterable[str]) -> bool:
    """Whether its ``x`` or ``y`` is that of x, y, z: two of the others differ in nothing but these."""
    words = words_of(name)
    if not {"x", "y"}.intersection(words):
        return False
    wanted = {tuple(axis if word in ("x", "y") else word for word in words) for axis in "xyz"}
    return wanted <= {words_of(other) for other in (name, *others)}
