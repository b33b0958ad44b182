"""Samples of several rows, by plain loops over lists: what servers have to send."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

OFFSETS = st.one_of(
    st.integers(-4, 5),
    st.lists(st.integers(-3, 4), min_size=1, max_size=4),
    st.builds(range, st.integers(-3, 0), st.integers(1, 5), st.integers(1, 2)),
)
"""Offsets of a field."""


class Windows:
    """The samples of a split."""

    def __init__(self, split: list[int], episodes: list[int], options: dict[str, Any]) -> None:
        self._options = options
        self._runs: list[list[int]] = []
        for row in split:
            if self._runs and self._runs[-1][-1] == row - 1 and episodes[row - 1] == episodes[row]:
                self._runs[-1].append(row)
            else:
                self._runs.append([row])
        self.run_of = {row: run for run in self._runs for row in run}

    def offsets(self, field: str) -> int | list[int]:
        own = self._options.get("offsets", {}).get(field)
        if own is not None:
            return own if isinstance(own, int) else list(own)
        length, rate = self._options.get("sequence_length"), self._options.get("sampling_rate", 1)
        return 0 if length is None else [rate * step for step in range(length)]

    def samples(self) -> list[int]:
        every = [0]
        for name in (None, *self._options.get("offsets", {})):
            own = self.offsets(name)
            every += [own] if isinstance(own, int) else own
        found = []
        for run in self._runs:
            ends = self._options.get("ends", "drop")
            early, late = ends in ("drop", "pad_end"), ends in ("drop", "pad_start")
            anchors = [
                row
                for row in run
                if not (early and row + min(every) < run[0]) and not (late and row + max(every) > run[-1])
            ]
            found += anchors[:: self._options.get("sequence_stride", 1)]
        return found

    def rows(self, sample: int, field: str) -> tuple[Any, Any]:
        """Row ids of a field of a sample, and which of them are real."""
        run, own = self.run_of[sample], self.offsets(field)
        wanted = [sample + offset for offset in ([own] if isinstance(own, int) else own)]
        rows, real = [min(max(row, run[0]), run[-1]) for row in wanted], [row in run for row in wanted]
        return (rows[0], real[0]) if isinstance(own, int) else (rows, real)
