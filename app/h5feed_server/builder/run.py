"""Runs a build: all cores make rows, and finished rows are never made again."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from h5feed.errors import BadParameter, FeedError, Overloaded, SourceUnavailable, TooLarge, Unreadable

from .. import __version__
from ..catalog.split_record import ATTRIBUTE as SPLIT_RECORD
from .crew import Crew, Job, Threads, sync_file
from .hdf5_writer import finish_file
from .journal import Journal, journal_bytes
from .moments import mean_and_std
from .options import BuildOptions
from .placed_rows import PlacedRows
from .plan import Part, Plan, beside, column_bytes, limited, make_plan
from .progress import OnProgress
from .report import Report, lost_classes, twins, write_left_out, write_means
from .source import Column, Source, digest_of
from .workplace import Workplace

_SPARE_BYTES = 1 << 20
"""Structure of the file, the journal."""

_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

_HDF5_ERRNO = re.compile(r"errno = (\d+)")

MAX_ROWS = 1 << 31
"""Rows of a source: some hundred bytes of each are held in memory."""


def build(
    source: str | Path,
    output: str | Path,
    options: BuildOptions | None = None,
    *,
    on_progress: OnProgress | None = None,
    crew: Crew | None = None,
) -> Report:
    """Build HDF5 for training from a folder, an archive, a table or another HDF5 file.

    Files have temporary names until they are complete. If a build is interrupted, killed or runs out of disk space, the
    same call continues where it stopped, and the result has the same bytes.

    Parameters
    ----------
    source : path, or URL of an object store
        See docs/how-to/build.md for all that is understood.
    output : path, or URL of an object store
        The file; with ``shards`` the pattern of their names, with ``split_files`` the folder.
    on_progress : callable, optional
        Called by this thread, several times a second.
    crew : Crew, optional
        Who does the work. Default: threads of this process.

    Raises
    ------
    BadParameter, SplitImpossible
        The options do not fit each other, or the source.
    Unreadable
        The source cannot be read; with ``strict``, a row of it.
    SourceUnavailable
        An object store does not answer. What is finished is kept for the next call.
    TooLarge
        There is not enough space. What is finished is kept for the next call.
    """
    options = options or BuildOptions()
    on_progress = on_progress or (lambda progress: None)
    with (
        Workplace(source, output, options, on_progress) as place,
        contextlib.closing(place.open_source(options)) as opened,
    ):
        made = _Build(opened, place, options, on_progress, crew)
        try:
            return made.run()
        except (OSError, RuntimeError) as error:
            if isinstance(error, FeedError):
                raise
            if _number(error) in _NO_SPACE:
                raise TooLarge(f"{made.space()}: free some space; to resume, run the same command again") from None
            if not isinstance(error, OSError):
                raise
            raise FeedError(f"{error.filename or place.output}: {error.strerror or error}") from None


class _Build:
    """One build."""

    def __init__(
        self,
        source: Source,
        place: Workplace,
        options: BuildOptions,
        on_progress: OnProgress,
        crew: Crew | None = None,
    ) -> None:
        output = place.output
        if crew is not None and (place.files is not None or place.store is not None):
            raise BadParameter("other nodes do not see the scratch folder: build from a path and at a path")
        self._source, self._place, self._output, self._options = source, place, output, options
        if options.store == "encoded" and not source.images:
            raise BadParameter("store=encoded keeps the bytes of image files, which this source does not have")
        self._folder = output if options.split_files else output.parent
        self._on_progress = on_progress
        self._wanted = wanted_rows(source, options)
        self._plan = make_plan(source, options, output, self._wanted)
        self._crew = crew or Threads()
        self._began = time.monotonic()

    def run(self) -> Report:
        source, options = self._source, self._options
        if options.strict and source.left_out:
            name, reason = next(iter(source.left_out.items()))
            raise Unreadable(f"{name}: {reason}")
        self._folder.mkdir(parents=True, exist_ok=True)
        about = {**options.about(), "output": str(self._output.name)}
        self._digest = digest_of([source.digest, source.rows, json.dumps(about, sort_keys=True), __version__])
        journal = Journal(beside(self._output, "journal"), self._digest, source.rows)
        try:
            if not journal.renames:
                self._check_free_names(self._plan)
                self._make(journal)
            report = self._publish(journal)
        except BaseException as error:
            kept = (TooLarge, Overloaded, SourceUnavailable)
            # Finished files may only have to be uploaded.
            hopeless = isinstance(error, FeedError) and not isinstance(error, kept) and journal.renames is None
            if hopeless or not journal.done.any():
                # Nothing that the same command could go on with.
                self._discard(journal)
            journal.close()
            raise
        journal.remove()
        return report

    def _check_free_names(self, plan: Plan) -> None:
        if self._place.store is not None:
            self._place.store.check_free(list(plan.files))
            return
        taken = [path for path in plan.files if path.exists()]
        if taken and not self._options.overwrite:
            raise BadParameter(f"{taken[0]} already exists: choose another name, or pass overwrite=True")

    def _discard(self, journal: Journal) -> None:
        for path in self._plan.files:
            beside(path, "part").unlink(missing_ok=True)
            beside(path, "whole").unlink(missing_ok=True)
        journal.remove()

    def _make(self, journal: Journal) -> None:
        parts = {path: beside(path, "part") for path in self._plan.files}
        if not all(part.exists() for part in parts.values()):
            journal.begin()
        self._check_space()
        rows = PlacedRows(self._plan, parts, self._source, fresh=not journal.done.any())
        job = Job(self._source, self._place.source, self._options, self._wanted, self._plan, self._on_progress)
        with contextlib.closing(rows):
            self._resumed_rows = int(journal.done.sum())
            written = self._crew.make_rows(job, rows, journal)
            usable = self._wanted & ~_mask(journal.broken, self._source.rows)
            final = make_plan(self._source, self._options, self._output, usable) if journal.broken else self._plan
            made = parts
            if journal.broken or self._options.compression != "none":
                made = {path: beside(path, "whole") for path in final.files}
                self._crew.lay_out(job, rows, {made[path]: own for path, own in final.files.items()}, written)
        self._plan = final
        for path, unfinished in made.items():
            self._finish(unfinished, final.files[path], journal)
        for leftover in set(parts.values()) - set(made.values()):
            leftover.unlink(missing_ok=True)
        journal.add_renames([(str(made[path].name), str(path.name)) for path in final.files])

    def _finish(self, unfinished: Path, parts: tuple[Part, ...], journal: Journal) -> None:
        source = self._source
        small = self._small_fields()
        columns: dict[str, dict[str, Column]] = {}
        for part in parts:
            own = {name: Column(c.values[part.rows], c.attributes) for name, c in small.items()}
            if source.images:
                details = journal.details[part.rows]
                own["heights"], own["widths"] = Column(details["height"].copy()), Column(details["width"].copy())
                hexed = [bytes(digest).hex().encode() for digest in details["digest"]]
                own["digests"] = Column(np.array(hexed, "S32"), {"of": "the file, BLAKE2b of 16 bytes"})
            for spec in source.fields:
                if spec.lengths is not None:
                    own[spec.offsets_name] = Column(spec.offsets(part.rows))
            columns[part.group] = own
        main = source.fields[0]
        marks: dict[str, Any] = {}
        means = self._means(journal)
        for part in parts:
            for key, value in means.items():
                marks[f"{part.group}/{main.name}@{key}".lstrip("/")] = value
        attributes = {
            "h5feed_version": __version__,
            "h5feed_options": json.dumps(self._options.about(), sort_keys=True),
            "h5feed_source": self._place.source.name,
            "h5feed_source_digest": self._content_digest(journal),
        }
        if self._plan.record is not None:
            attributes[SPLIT_RECORD] = self._plan.record.model_dump_json()
        finish_file(unfinished, columns, attributes, marks)

    def _small_fields(self) -> dict[str, Column]:
        """Those of the source, of all of its rows; texts no longer than those of rows that were not left out."""
        rows = np.concatenate([part.rows for part in self._plan.parts()])
        return {name: _narrowed(column, rows) for name, column in self._source.columns.items()}

    def _content_digest(self, journal: Journal) -> str:
        """Of the rows and their labels in the source's order: it is the same for a copy of the source."""
        usable = np.sort(np.concatenate([part.rows for part in self._plan.parts()]))
        whole = hashlib.blake2b(journal.details["digest"][usable].tobytes(), digest_size=16)
        for name, column in self._small_fields().items():
            whole.update(name.encode() + column.values[usable].tobytes())
        return whole.hexdigest()

    def _means(self, journal: Journal) -> dict[str, list[float]]:
        """Of the main field's train rows, per channel."""
        main = self._source.fields[0]
        is_number = main.dtype.kind in "biuf" and not main.is_bfloat16
        # The bytes of images have been decoded; lists of numbers have no moments.
        if not is_number or not main.row_bytes or (main.lengths is not None and not self._source.images):
            return {}
        details = journal.details[self._plan.train]
        each = main.values // main.channels
        mean, std = mean_and_std(details["sums"], details["squares"], details["missing"], main.channels, each)
        return {"mean": mean, "std": std}

    def _publish(self, journal: Journal) -> Report:
        """Give the files their names, and say what was built."""
        assert journal.renames is not None
        folder = self._folder
        for old, new in journal.renames:
            if (folder / old).exists():
                os.replace(folder / old, folder / new)
        if journal.broken:
            usable = self._wanted & ~_mask(journal.broken, self._source.rows)
            self._plan = make_plan(self._source, self._options, self._output, usable)
        sync_file(folder)
        files = tuple(folder / new for _, new in journal.renames)
        nbytes = sum(path.stat().st_size for path in files)
        left_out = dict(self._source.left_out)
        left_out.update({self._source.name(row): reason for row, reason in sorted(journal.broken.items())})
        write_left_out(self._output, left_out)
        means = self._means(journal)
        if self._options.mean_json is not None:
            write_means(self._options.mean_json, means.get("mean", []), self._source.fields[0].attributes)
        store = self._place.store
        urls = () if store is None else store.send(files, self._output)
        return Report(
            files if store is None else (),
            {split: len(self._plan.rows_of(split)) for split in self._plan.splits},
            nbytes,
            time.monotonic() - self._began,
            getattr(self, "_resumed_rows", self._source.rows),
            left_out,
            means,
            (
                *map(self._place.in_words, self._source.notes),
                *self._plan.notes,
                *lost_classes(self._source, self._plan),
                *twins(self._plan, journal.details["digest"], self._source.images),
            ),
            urls,
        )

    def space(self) -> str:
        """What is still needed, and what is there, in words."""
        needed, free, folder = self._needed_and_free()
        times = " while it is compressed" if self._options.compression != "none" else ""
        return f"{self._output} still needs {needed:,} bytes{times}, and {folder.resolve()} has {free:,} left"

    def _check_space(self) -> None:
        needed, free, _ = self._needed_and_free()
        if needed > free:
            raise TooLarge(f"{self.space()}: free some space, or choose a smaller size or a limit")

    def _needed_and_free(self) -> tuple[int, int, Path]:
        raw = self._plan.rows * sum(spec.row_bytes for spec in self._source.fields)
        times = 2 if self._options.compression != "none" else 1
        needed = times * raw + column_bytes(self._source.columns, self._plan.rows) + _SPARE_BYTES
        needed += journal_bytes(self._source.rows)
        unfinished = [beside(path, what) for path in self._plan.files for what in ("part", "whole")]
        unfinished.append(beside(self._output, "journal"))
        allocated = sum(path.stat().st_blocks * 512 for path in unfinished if path.exists())
        return max(0, needed - allocated), shutil.disk_usage(self._folder).free, self._folder


def _number(error: Exception) -> int | None:
    """The system's number of an error; HDF5 hides it in its text."""
    said = _HDF5_ERRNO.search(str(error))
    return int(said[1]) if said else getattr(error, "errno", None)


def wanted_rows(source: Source, options: BuildOptions) -> npt.NDArray[np.bool_]:
    """Which rows of a source are to be built."""
    if source.rows >= MAX_ROWS:
        raise TooLarge(f"the source has {source.rows} rows, more than the limit of {MAX_ROWS - 1}")
    labels = source.columns.get(source.label) if source.label else None
    wanted = np.zeros(source.rows, np.bool_)
    wanted[limited(options.limit, source.rows, labels, source.splits)] = True
    return wanted


def _mask(rows: dict[int, str], total: int) -> npt.NDArray[np.bool_]:
    mask = np.zeros(total, np.bool_)
    mask[list(rows)] = True
    return mask


def _narrowed(column: Column, rows: npt.NDArray[np.int64]) -> Column:
    """Texts no longer than the longest of these rows: rows that were left out leave no trace."""
    if column.values.dtype.kind != "S":
        return column
    longest = max(1, int(np.strings.str_len(column.values[rows]).max(initial=1)))
    return Column(column.values.astype(f"S{longest}"), column.attributes)
