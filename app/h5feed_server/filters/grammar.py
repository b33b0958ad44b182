"""The grammar of ``where``: conditions on the rows of a dataset, such as ``label in cat, dog`` and ``width >= 200``.

::

    condition = field operator value | field ["not"] "in" item {"," item} | field "startswith" value
    operator  = "=" | "==" | "!=" | "<" | "<=" | ">" | ">="
    item      = value | [value] ".." [value]
    field     = word | string
    value     = word | string

A word consists of letters, digits and ``_ . - /``; words of values also of ``+`` and ``:``, which occur in numbers and
times. A string is a JSON string. Text is only parsed here, never evaluated. The meaning of a value depends on the
field: see `predicates`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, cast

MAX_CONDITIONS = 16

MAX_CHARS = 4096
"""Maximum characters of one condition."""

MAX_ITEMS = 1000
"""Maximum number of values and ranges in one condition."""

Operator = Literal["=", "!=", "<", "<=", ">", ">=", "in", "not in", "startswith"]

_TOKEN = re.compile(
    r"""[ \t\r\n]*(?:
    (?P<string> "(?:[^"\\\x00-\x1f]|\\.)*" )
    | (?P<range> \.\. )
    | (?P<sign> == | != | <= | >= | = | < | > )
    | (?P<comma> , )
    | (?P<word> (?: (?!\.\.) [\w./+:-] )+ )
    | (?P<end> \Z )
    )""",
    re.VERBOSE,
)
_FIELD = re.compile(r"(?:(?!\.\.)[\w./-])+")
_VALUE = re.compile(r"(?:(?!\.\.)[\w./+:-])+")
_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:e[+-]?[0-9]+)?", re.IGNORECASE | re.ASCII)
_WHOLE = re.compile(r"[+-]?[0-9]+", re.ASCII)
_NAMED = {"true": True, "false": False}
_NAMED_FLOATS = {sign + name for sign in ("", "+", "-") for name in ("inf", "infinity", "nan")}

_AROUND = 2
"""Spaces around the operator of a canonical text."""

_MAX_CANONICAL_CHARS = MAX_CHARS + MAX_ITEMS + _AROUND
"""Canonical texts, which are parsed again, have these spaces and one after each comma, even if the text did not."""

_SHOWN = 200
"""Maximum characters of a condition in a message."""


class InvalidCondition(ValueError):
    """A condition does not follow the grammar; the message contains the condition and the reason."""

    def __init__(self, condition: str, why: str) -> None:
        shown = condition if len(condition) <= _SHOWN else f"{condition[:_SHOWN]}…"
        super().__init__(f"{shown!r}: {why}")


@dataclass(frozen=True)
class Value:
    """A value as written.

    Attributes
    ----------
    text : str
    quoted : bool
        Whether it was a JSON string. It is then text, even if it looks like a number.
    """

    text: str
    quoted: bool = False

    @property
    def number(self) -> int | float | bool | None:
        """The value as a number or bool; None if it is quoted or another word."""
        if self.quoted:
            return None
        word = self.text.lower()
        if _WHOLE.fullmatch(word):
            return int(word)
        if _NUMBER.fullmatch(word) or word in _NAMED_FLOATS:
            return float(word)
        return _NAMED.get(word)

    @property
    def is_quoted_number(self) -> bool:
        """Whether it would be a number without its quotes."""
        return self.quoted and Value(self.text).number is not None

    def __str__(self) -> str:
        is_word = _VALUE.fullmatch(self.text) and not self.is_quoted_number
        return self.text if is_word else json.dumps(self.text, ensure_ascii=False)


@dataclass(frozen=True)
class Range:
    """Values from `low` to `high`, inclusive. None: no bound."""

    low: Value | None
    high: Value | None

    def __str__(self) -> str:
        low, high = ("" if bound is None else str(bound) for bound in (self.low, self.high))
        return f"{low}{' ' if low.endswith('.') else ''}..{high}"


@dataclass(frozen=True)
class Condition:
    """One condition. `items` is a single `Value`, except for ``in`` and ``not in``."""

    field: str
    operator: Operator
    items: tuple[Value | Range, ...]

    def __str__(self) -> str:
        """The canonical text: single spaces, no needless quotes, sorted items without duplicates."""
        field = self.field if _FIELD.fullmatch(self.field) else json.dumps(self.field, ensure_ascii=False)
        return f"{field} {self.operator} {', '.join(sorted(set(map(str, self.items))))}"


def canonical(where: Iterable[str]) -> tuple[str, ...]:
    """The canonical texts of conditions, sorted and without duplicates, because the order does not matter.

    Raises
    ------
    InvalidCondition
    ValueError
        There are too many.
    """
    found = {str(parse(condition)) for condition in where}
    if len(found) > MAX_CONDITIONS:
        raise ValueError(f"{len(found)} conditions are more than the {MAX_CONDITIONS} of one request")
    return tuple(sorted(found))


def parse(text: str) -> Condition:
    """Parse a condition.

    Raises
    ------
    InvalidCondition
    """
    condition = _Parser(text).condition()
    if len(text) > MAX_CHARS and (str(condition) != text or len(text.replace(", ", ",")) > MAX_CHARS + _AROUND):
        raise _too_long(text)
    return condition


def _too_long(text: str) -> InvalidCondition:
    return InvalidCondition(text, f"it has {len(text)} characters, more than the {MAX_CHARS} of one condition")


@dataclass(frozen=True)
class _Token:
    kind: str
    text: str

    def __str__(self) -> str:
        return "the end" if self.kind == "end" else repr(self.text)


class _Parser:
    def __init__(self, text: str) -> None:
        self._text = text
        if len(text) > _MAX_CANONICAL_CHARS:
            raise _too_long(text)
        self._place = 0
        self._token = self._next()

    def condition(self) -> Condition:
        field = self._field()
        operator = self._operator()
        items: list[Value | Range]
        if operator not in ("in", "not in"):
            items = [self._value()]
            if self._token.kind in ("comma", "range"):
                raise self._invalid(f"{operator!r} takes one value: use 'in' for several values and for ranges")
        else:
            items = [self._item()]
            while self._token.kind == "comma":
                self._advance()
                items.append(self._item())
                if len(items) > MAX_ITEMS:
                    raise self._invalid(f"it has more than the {MAX_ITEMS} items of one condition")
        if self._token.kind != "end":
            hint = ""
            if self._token.text.lower() in ("and", "or"):
                hint = "; give 'where' once for each condition: all must hold. 'in' takes several values"
            elif self._token.kind == "word":
                hint = ': put text with spaces in double quotes, as in "red fox"'
            raise self._invalid(f"unexpected {self._token}{hint}")
        return Condition(field, operator, tuple(items))

    def _field(self) -> str:
        token = self._advance()
        if token.kind == "string":
            return self._unquoted(token)
        if token.kind != "word":
            raise self._invalid(f"expected a field, then a comparison and a value, as in 'width >= 200', not {token}")
        if not _FIELD.fullmatch(token.text):
            raise self._invalid(f"the field {token} must be quoted: {json.dumps(token.text)}")
        return token.text

    def _operator(self) -> Operator:
        token = self._advance()
        word = token.text.lower()
        if token.kind == "sign":
            return "=" if word == "==" else cast("Operator", word)
        if token.kind == "word" and word in ("in", "startswith"):
            return cast("Operator", word)
        if token.kind == "word" and word == "not" and self._token.text.lower() == "in":
            self._advance()
            return "not in"
        if token.kind == "end":
            raise self._invalid(
                "the condition ends after the field: add a comparison and a value, as in 'width >= 200'"
            )
        is_name = token.kind == "word" and word != "not"
        hint = ': put a field name with spaces in double quotes, as in "my field"' if is_name else ""
        raise self._invalid(
            f"expected =, !=, <, <=, >, >=, 'in', 'not in' or 'startswith' after the field, not {token}{hint}"
        )

    def _item(self) -> Value | Range:
        low = None if self._token.kind == "range" else self._value()
        if self._token.kind != "range":
            assert low is not None
            return low
        self._advance()
        return Range(low, self._value() if self._token.kind in ("word", "string") else None)

    def _value(self) -> Value:
        token = self._advance()
        if token.kind == "string":
            return Value(self._unquoted(token), quoted=True)
        if token.kind == "word":
            return Value(token.text)
        raise self._invalid(f"expected a value, not {token}")

    def _unquoted(self, token: _Token) -> str:
        try:
            text: str = json.loads(token.text)
            text.encode()
        except ValueError:
            raise self._invalid(f"{token.text} is not a string of JSON") from None
        return text

    def _advance(self) -> _Token:
        token, self._token = self._token, self._next()
        return token

    def _next(self) -> _Token:
        match = _TOKEN.match(self._text, self._place)
        if match is None:
            rest = self._text[self._place :].lstrip(" \t\r\n")
            if rest.startswith('"'):
                raise self._invalid("a string is not closed, or has characters that JSON writes as \\n, \\t or \\u…")
            if rest.startswith("'"):
                raise self._invalid(f'unexpected {rest[0]!r}: use double quotes for text, as in "cat"')
            raise self._invalid(f'unexpected {rest[0]!r}: text with such characters is quoted, as in "{rest[0]}"')
        self._place = match.end()
        assert match.lastgroup is not None
        return _Token(match.lastgroup, match[match.lastgroup])

    def _invalid(self, why: str) -> InvalidCondition:
        return InvalidCondition(self._text, why)
