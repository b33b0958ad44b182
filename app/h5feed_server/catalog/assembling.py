"""Assembles datasets from the arrays in files, following declarations and, where there are none, heuristics."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from h5feed.errors import BadParameter, Unreadable
from h5feed.images import ImageSpec
from h5feed.stored.column import Column
from h5feed.stored.local_file import Identity

from .card import Card, card_of
from .class_name_check import Read, with_fitting_names
from .dataset import Dataset, Field, describe_fields
from .declared import NAME as DECLARATION
from .declared import DeclaredDataset
from .description import rows_of
from .discovery import distinct, dotted, shown
from .grouping import alike, fuel, weights
from .grouping.assembly import CLASS_REASON
from .grouping.families import Family, apart, glob_of
from .grouping.pieces import Hints, InDoubt, InspectedFile, Table
from .grouping.tables import PartMissing, tables_of
from .loading import LoadedFile
from .names import Names
from .packed import with_packing
from .split_record import SplitRecord, read_record


@dataclass(frozen=True)
class Refused:
    """A possible dataset, and why it is not one."""

    files: tuple[str, ...]
    reason: str


class Assembler:
    """Assembles datasets.

    Parameters
    ----------
    root : Path
        The data folder.
    digest_limit : int
        Bytes of a file up to which its revision covers all of it.
    holds_classes : callable
        Returns whether the values of a column may be classes. Called if nothing else identifies the label.
    block : callable
        ``block(column, start, stop)`` returns rows start … stop-1 of a column, or None if they cannot be read.
    """

    def __init__(self, root: Path, digest_limit: int, holds_classes: Callable[[Column], bool], block: Read) -> None:
        self._root = root
        self._digest_limit = digest_limit
        self._holds_classes = holds_classes
        self._block = block

    def divide(
        self,
        family: Family,
        loaded: Mapping[str, LoadedFile],
        failed: Mapping[str, Unreadable],
        refused: dict[str, Refused],
        declaration: bytes,
    ) -> tuple[Dataset, ...]:
        """Return the datasets in a family of files: joint ones of all files, or separate ones of each file.

        Parameters
        ----------
        family : Family
        loaded : mapping of str to LoadedFile
            The files that could be read, by path.
        failed : mapping of str to Unreadable
            Why the others could not be read, by path.
        refused : dict of str to Refused
            Updated with what cannot be served although other parts can, by name.
        declaration : bytes
            The declaration of the dataset, serialised. It is part of the revision.

        Raises
        ------
        Unreadable
            There is no dataset that can be served.
        """
        notes: tuple[str, ...] = ()
        together = family.kind != "alone"
        hints = Hints()
        if family.declared is not None:
            said = family.declared
            hints = Hints(said.stack, said.classes, said.episodes, said.rows_along)
        elif family.kind in ("numbers", "words"):
            try:
                verdict = _verdict(family, loaded)
            except InDoubt as error:
                raise Unreadable(_in_doubt(str(error), family.name, family.files, "stack")) from None
            together = verdict.kind != "apart"
            notes = (verdict.note,) if verdict.note else ()
            hints = Hints(stack=verdict.kind == "samples" or None, classes=verdict.kind == "classes" or None)
            if together and failed:
                file, first = next(iter(failed.items()))
                raise Unreadable(f"{shown(file)}, one of its {len(family.files)} files, cannot be read: {first.detail}")
        if together:
            try:
                return self._datasets(family, list(loaded.values()), hints, refused, declaration, notes)
            except PartMissing as error:
                raise Unreadable(str(error)) from None
            except InDoubt as error:
                raise Unreadable(_in_doubt(str(error), family.name, family.files, "stack")) from None
            except ValueError as error:
                if family.declared is not None:
                    raise Unreadable(str(error)) from None
        # The files look like parts of one dataset by their names, but not by their content.
        datasets: list[Dataset] = []
        for one in [family] if family.kind == "alone" else apart(family):
            try:
                if one.kind != "alone":
                    there = {file: loaded[file] for file in one.files if file in loaded}
                    lacking = {file: failed[file] for file in one.files if file in failed}
                    datasets += self.divide(one, there, lacking, refused, declaration)
                    continue
                if one.files[0] in failed:
                    raise failed[one.files[0]]
                datasets += self._datasets(one, [loaded[one.files[0]]], Hints(), refused, declaration, notes)
            except (Unreadable, ValueError) as error:
                reason = error.detail if isinstance(error, Unreadable) else str(error)
                if isinstance(error, InDoubt):
                    reason = _in_doubt(reason, one.name, one.files, "stack")
                refused[one.name] = Refused(one.files, reason)
                if family.kind == "alone":
                    raise Unreadable(reason) from None
        return tuple(datasets)

    def _datasets(
        self,
        family: Family,
        loaded: Sequence[LoadedFile],
        hints: Hints,
        refused: dict[str, Refused],
        declaration: bytes,
        notes: tuple[str, ...],
    ) -> tuple[Dataset, ...]:
        """The datasets in files that form one unit.

        Raises
        ------
        Unreadable
            There is no dataset that can be served.
        ValueError
            The files do not fit together.
        """
        _refuse_weights(family, loaded)
        tables = tables_of(_inspected(family, loaded), hints)
        notes = (*notes, *_apply_fuel(loaded, tables))
        identities = tuple(
            dict.fromkeys(part for one in loaded for segment in one.segments.values() for part in segment.file.key)
        )
        origin = _Origin(
            family,
            self._names_of(family, loaded, hints, declaration),
            identities,
            digest_in_full=all(identity.size <= self._digest_limit for identity, _ in identities),
            attributes=[one.layout.attributes for one in loaded],
            decode=_images_declared(family.declared, [field.name for table in tables for field in table.fields]),
            notes=(*dict.fromkeys(note for one in loaded for note in one.layout.notes), *notes),
        )
        datasets: list[Dataset] = []
        reasons: list[str] = []
        for table in tables:
            is_main = not table.path or len(tables) == 1
            name = family.name if is_main else f"{family.name}.{dotted(table.path)}"
            dataset = self._dataset(table, name, origin, is_main=is_main)
            if isinstance(dataset, Dataset):
                datasets.append(dataset)
            else:
                refused[name] = Refused(family.files, "; ".join(dataset))
                reasons += dataset
        if not datasets:
            raise Unreadable("; ".join(reasons[:5]) or "it holds no arrays")
        return tuple(datasets)

    def _names_of(self, family: Family, loaded: Sequence[LoadedFile], hints: Hints, declaration: bytes) -> Names:
        # Names of files are served too, if they are names of rows or classes, so they are part of the revision.
        called = family.rows if hints.stack or hints.classes or hints.rows_along is not None else ()
        if any(tags.split for tags in family.tags):
            called = (*called, *(tags.split or "" for tags in family.tags))
        contents = tuple(content for one in loaded for content in one.contents)
        return Names(contents, str(self._root), declaration, json.dumps(called).encode() if called else b"")

    def _dataset(self, table: Table, name: str, origin: _Origin, *, is_main: bool) -> Dataset | list[str]:
        """The dataset made of a table, or the reasons why there is none.

        Parameters
        ----------
        table : Table
        name : str
            Name of the dataset.
        origin : _Origin
        is_main : bool
            Whether the dataset has the name of the file or declaration. Declared splits apply to this one.

        Raises
        ------
        Unreadable
            The declaration does not fit the data.
        """
        family, declared = origin.family, origin.family.declared
        if table.problem is not None:
            return [_in_doubt(table.problem, family.name, family.files, "classes")]
        table.fields[:] = with_packing(table.fields, declared is not None and declared.apply == "scale")
        fields = describe_fields(table, declared.roles if declared else None, origin.decode, self._holds_classes)
        if not any(field.unreadable is None for field in fields):
            return [f"{field.name}: {field.unreadable}" for field in fields[:5]]
        label = next((field for field in fields if field.role == "label" and not field.unreadable), None)
        fields = _with_class_names(fields, label, table.class_names, declared.class_names if declared else None)
        fields = with_fitting_names(fields, self._block)
        names = next((field.class_names for field in fields if label and field.name == label.name), None)
        native, record, notes = _splits_of(table, origin, is_main=is_main)
        return Dataset(
            name=name,
            files=family.files,
            revision=origin.names.current,
            names=origin.names,
            digest_in_full=origin.digest_in_full,
            rows=table.rows,
            fields=fields,
            attributes=origin.attributes[0],
            native=native,
            class_names=list(names) if names else None,
            identity=origin.identities,
            notes=(*origin.notes, *table.notes, *notes),
            split_record=record,
            has_named_pieces=any(name for name, _ in table.episodes),
            card=card_of(declared.card if declared is not None else Card(), origin.attributes[0]),
        )


@dataclass(frozen=True)
class _Origin:
    """What all datasets in the same files have in common."""

    family: Family
    names: Names
    identities: tuple[tuple[Identity, bytes], ...]
    digest_in_full: bool
    attributes: Sequence[dict[str, Any]]
    """Root attributes of each file."""
    decode: Mapping[str, ImageSpec]
    notes: tuple[str, ...]


def _refuse_weights(family: Family, loaded: Sequence[LoadedFile]) -> None:
    """Raise if a file holds model weights, unless it is declared as a dataset.

    Raises
    ------
    Unreadable
    """
    if family.declared is not None:
        return
    for file, one in zip(family.files, loaded, strict=True):
        if reason := weights.reason_for(one.layout.attributes, one.segments):
            raise Unreadable(reason if len(family.files) == 1 else f"{shown(file)}: {reason}")


def _apply_fuel(loaded: Sequence[LoadedFile], tables: list[Table]) -> list[str]:
    """Apply the splits in Fuel's attribute of a file to its tables. Returns notes if it is ignored."""
    if len(loaded) == 1:
        fuel.apply(loaded[0].layout.attributes.get(fuel.ATTRIBUTE), tables)
    elif any(isinstance(one.layout.attributes.get(fuel.ATTRIBUTE), list) for one in loaded):
        return [f"the attribute {fuel.ATTRIBUTE!r} of its files is ignored: it describes a single file"]
    return []


def _splits_of(
    table: Table, origin: _Origin, *, is_main: bool
) -> tuple[dict[str, list[tuple[int, int]]], SplitRecord | None, list[str]]:
    """Declared or stored splits of a table, the record of how they were drawn, and notes on them."""
    declared = origin.family.declared
    if declared is not None and declared.splits:
        native = declared.native(table.rows) if is_main else table.native
        return native, None, _notes_of_declared(native, table.native, is_main)
    if not table.native:
        return table.native, None, []
    record, problem = read_record(origin.attributes, rows_of(table.native))
    return table.native, record, [problem] if problem else []


def _with_class_names(
    fields: tuple[Field, ...],
    label: Field | None,
    classes: tuple[str, ...] | None,
    declared: Sequence[str] | None,
) -> tuple[Field, ...]:
    """The fields, with class names that are declared or that are the names of arrays, groups or files.

    Raises
    ------
    Unreadable
        The declared names do not fit the classes.
    """
    named = label
    if classes is not None:
        named = next((field for field in fields if field.role_reason == CLASS_REASON), label)
        known = f"its classes are {json.dumps(list(classes))}, numbered in this order"
        if declared and (
            len(declared) != len(classes) or (set(declared) == set(classes) and [*classes] != [*declared])
        ):
            raise Unreadable(f"{DECLARATION}: class_names={json.dumps(list(declared))} does not fit: {known}")
    names = tuple(declared or classes or ())
    if not names:
        return fields
    return tuple(replace(field, class_names=names) if field is named else field for field in fields)


def _notes_of_declared(
    native: Mapping[str, Sequence[tuple[int, int]]], stored: Mapping[str, Sequence[tuple[int, int]]], main: bool
) -> list[str]:
    """Notes on declared splits."""
    if not main:
        return [f"{DECLARATION} declares splits, which apply to the arrays in the root and not to this group"]
    if not stored or native == stored:
        return []
    rows = ", ".join(f"{name} {count:,}" for name, count in rows_of(stored).items())
    return [f"the splits that {DECLARATION} declares replace those in the files ({rows})"]


def _inspected(family: Family, loaded: Sequence[LoadedFile]) -> list[InspectedFile]:
    """The arrays of each file by field name, which is declared or the path in the file.

    Raises
    ------
    Unreadable
        A declared array is missing.
    """
    inspected = []
    alike_shown = Counter(map(shown, family.rows))
    for file, tags, row, one in zip(family.files, family.tags, family.rows, loaded, strict=True):
        segments, names = one.fields, {}
        if family.declared is not None and family.declared.fields is not None:
            # Declarations may use the path in the file or the name that a convention gives.
            known = one.segments | one.fields
            missing = [path for path in family.declared.fields.values() if path not in known]
            if missing:
                raise Unreadable(f"{DECLARATION} names the array {missing[0]!r}, which {shown(file)} does not have")
            segments = {name: known[path] for name, path in family.declared.fields.items()}
            names = {path: s.array.text for path, s in one.segments.items() if s.array.text is not None}
        # Names that differ only in bytes that are not UTF-8 look the same when shown.
        own = distinct(file) if alike_shown[shown(row)] > 1 else shown(row)
        inspected.append(InspectedFile(segments, tags, own, names))
    return inspected


def _verdict(family: Family, loaded: Mapping[str, LoadedFile]) -> alike.Verdict:
    """How files with similar names are related."""
    there = [place for place, file in enumerate(family.files) if file in loaded]
    files = [
        InspectedFile(loaded[family.files[place]].segments, family.tags[place], family.rows[place]) for place in there
    ]
    if len(files) < 2 or any(weights.reason_for(one.layout.attributes, one.segments) for one in loaded.values()):
        return alike.APART
    return alike.of_words(files) if family.kind == "words" else alike.of_numbers(files, family.files)


def _in_doubt(reason: str, name: str, files: Sequence[str], key: Literal["stack", "classes"]) -> str:
    """Why an ambiguous dataset is not served, with the two lines of ``h5feed.toml`` that resolve it."""
    line = f"datasets.{json.dumps(name)} = {{ files = [{json.dumps(shown(glob_of(files)))}], {key} = "
    ways = {
        "stack": (f"one row per {'file' if len(files) > 1 else 'group'}", "rows along the first axis"),
        "classes": ("one class each", "fields"),
    }[key]
    lines = f"{line}true }} ({ways[0]}) or {line}false }} ({ways[1]})"
    return f"{reason}. Add one of these lines to {DECLARATION}: {lines}"


def _images_declared(declared: DeclaredDataset | None, fields: Sequence[str]) -> dict[str, ImageSpec]:
    """The declared decoding of image fields, by field.

    Raises
    ------
    Unreadable
        There is no such field, or the declaration is invalid.
    """
    specs = {}
    for name, images in (declared.decode if declared else {}).items():
        if name not in fields:
            raise Unreadable(f"{DECLARATION}: decode: there is no field {name!r}: the fields are {fields}")
        try:
            specs[name] = images.spec
        except BadParameter as error:
            raise Unreadable(f"{DECLARATION}: decode.{name}: {error.detail}") from None
    return specs
