"""Information about splits: rows, classes and their shares, and balanced class weights."""

from __future__ import annotations

import html
import logging
from collections.abc import Mapping
from typing import Any

from .errors import BadParameter
from .suggestions import did_you_mean
from .tables import html_table, text_lines

logger = logging.getLogger("h5feed")

_told: dict[tuple[str, str, str], None] = {}
"""Datasets, revisions and options for which the warning about replaced splits was logged."""

_SHOWN = 30
"""Maximum number of classes in a table."""


def tell_replaced(name: str, revision: str, options: Mapping[str, Any], note: str) -> None:
    """Warn that stored splits are replaced: once per dataset and options, for all splits, folds and threads."""
    asked = ", ".join(
        f"{key}={options[key]}" for key in sorted(options) if key not in ("fold", "where") and options[key] is not None
    )
    key = name, revision, asked
    if key not in _told:
        _told[key] = None
        logger.warning("%s with %s: %s", name, asked, note)


def replaced_told(name: str, revision: str, told: frozenset[str] = frozenset()) -> frozenset[str]:
    """The options for which the warning was logged; adds those of another process."""
    _told.update(dict.fromkeys((name, revision, asked) for asked in told))
    return frozenset(asked for known, of, asked in list(_told) if (known, of) == (name, revision))


class Splits(dict[str, Any]):
    """The splits of a dataset: a dict of the server's response. Prints as a table in terminals and notebooks.

    Attributes
    ----------
    names : list of str
        ``all`` first.
    method : str or None
        The scikit-learn function or class that gives the same rows.
    note : str or None
        Anything unexpected: why rows are not stratified, which classes are small, which stored splits are replaced.
    """

    @property
    def names(self) -> list[str]:
        return list(self["splits"])

    @property
    def method(self) -> str | None:
        return self["method"]  # type: ignore[no-any-return]

    @property
    def note(self) -> str | None:
        return self["note"]  # type: ignore[no-any-return]

    def class_weight(self, split: str = "train") -> dict[int, float]:
        """Balanced weight of each class, for ``model.fit(class_weight=…)``.

        Keys are integer labels, or positions of one-hot labels. Other classes (text, fractional numbers) are numbered
        in ascending order, over all rows.

        Raises
        ------
        BadParameter
            The split does not exist, or rows have no class or more than one.
        """
        if split not in self["splits"]:
            raise BadParameter(f"no split {split!r}: {did_you_mean(split, self.names)}")
        if self.get("classes_are") == "multi-label":
            raise BadParameter(f"{self['classes_of']!r} is multi-label and has no class weights: use sample weights")
        if "classes" not in self["splits"][split]:
            many = self["splits"][split].get("classes_total")
            why = f"{many} classes are more than the server lists" if many else self.note or "the label has no classes"
            raise BadParameter(f"no class weights: {why}")
        known = [entry["value"] for entry in self["splits"]["all"]["classes"]]
        if all(isinstance(value, int | float) and float(value).is_integer() for value in known):
            number = {value: int(value) for value in known}
        else:
            number = {value: index for index, value in enumerate(known)}
        return {number[entry["value"]]: entry["weight"] for entry in self["splits"][split]["classes"]}

    def __repr__(self) -> str:
        lines = [f"<Splits of {self['dataset']!r}, {self._how()}>"]
        for table in self._tables():
            lines += text_lines(table)
        return "\n".join(lines + ([f"note: {self.note}"] if self.note else []))

    def _repr_html_(self) -> str:
        parts = [f"<p>Splits of <b>{html.escape(str(self['dataset']))}</b>, {html.escape(self._how())}</p>"]
        for head, *rows in self._tables():
            parts.append(html_table(head, rows, "right"))
        if self.note:
            parts.append(f"<p>{html.escape(self.note)}</p>")
        return "".join(parts)

    def _how(self) -> str:
        stored = [split["stored"] for split in self["splits"].values() if "stored" in split]
        how = self.method or ("as stored" if all(stored) else "partly as stored")
        if self["stratify"]:
            how += f", stratified by {self['stratify']!r}"
        if self["group"]:
            how += f", groups of {self['group']!r} together"
        if self.get("where"):
            how += f", where {' and '.join(self['where'])}"
        return f"{how}, revision {self['revision']}"

    def _tables(self) -> list[list[list[str]]]:
        """A table of splits, and a table of classes by split if there are any. Each starts with its header."""
        splits: dict[str, dict[str, Any]] = self["splits"]
        has = {key for split in splits.values() for key in split}
        head = ["split", "rows", "share"]
        head += [word for word, key in (("groups", "groups"), ("max. deviation", "max_deviation")) if key in has]
        table = [[*head, "digest"]]
        for name, split in splits.items():
            line = [name, f"{split['rows']:,}", _percent(split["share"])]
            line += [f"{split['groups']:,}"] if "groups" in has else []
            line += [_percent(split["max_deviation"], 3)] if "max_deviation" in has else []
            table.append([*line, split["digest"]])
        tables = [table]
        if all("classes" in split for split in splits.values()):
            tables.append(self._class_table(splits))
        return tables

    def _class_table(self, splits: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
        by_value = {name: {entry["value"]: entry for entry in split["classes"]} for name, split in splits.items()}
        table = [[str(self["classes_of"]), *splits]]
        classes = splits["all"]["classes"]
        for entry in classes[:_SHOWN]:
            line = [entry["name"] or str(entry["value"])]
            for name in splits:
                counted = by_value[name].get(entry["value"])
                line.append(f"{counted['rows']:,} ({_percent(counted['share'])})" if counted else "–")
            table.append(line)
        if len(classes) > _SHOWN:
            table.append([f"… {len(classes) - _SHOWN} more", *[""] * len(splits)])
        return table


def _percent(share: float, digits: int = 1) -> str:
    return f"{100 * share:.{digits}f}%"
