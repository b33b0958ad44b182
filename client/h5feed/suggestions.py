"""Names that users type: which there are, and which one was meant."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from itertools import islice
from typing import Any

from .errors import BadParameter, FieldNotFound

_MAX_CHARS, _MAX_NAMES = 200, 2000
"""Of what is compared: it takes time by the square of the length, for each name."""


def did_you_mean(name: str, known: Iterable[str], rest: str | None = None) -> str:
    """``did you mean 'batch_size'? There are …`` where a known name is like this one, else the rest alone.

    Parameters
    ----------
    rest : str, optional
        Which names there are; default: ``there are`` all that are known.
    """
    known = list(known)
    rest = rest or f"there are {', '.join(known) or 'none'}"
    if len(name) > _MAX_CHARS:
        return rest
    alike = {_plain(candidate): candidate for candidate in islice(known, _MAX_NAMES)}
    nearest = get_close_matches(_plain(name), alike, 1)
    return f"did you mean {alike[nearest[0]]!r}? {rest[:1].upper()}{rest[1:]}" if nearest else rest


def no_field(name: object, known: Iterable[str], whose: str) -> FieldNotFound:
    """The error to raise where a name is that of no field: it says which there are, and which was meant."""
    return FieldNotFound(f"{whose} {name!r}: {did_you_mean(str(name), known)}")


def check_options(given: Iterable[str], takes: Callable[..., Any], *more: Mapping[str, Any] | Iterable[str]) -> None:
    """Raise `BadParameter` where an option is none: it names the one that was meant, and all there are.

    Parameters
    ----------
    takes : callable
        What the options were given to: those of its parameters that have a default are options too.
    more : iterables of str
        Options that it takes as ``**options``.
    """
    beyond = {name for names in more for name in names}
    unknown = sorted(set(given) - beyond)
    if not unknown:
        return
    own = {name for name, one in inspect.signature(takes).parameters.items() if one.default is not one.empty}
    known = sorted(own | beyond)
    name = unknown[0]
    said = did_you_mean(name, known, f"the options are {', '.join(known)}")
    raise BadParameter(f"unknown option {name!r}: {said}")


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
