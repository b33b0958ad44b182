"""NeXus files: the signal of NXdata is the input, also through a link into the detector's file."""

from __future__ import annotations

from pathlib import Path

import h5feed
import h5py
import numpy as np

from tests.support.server_process import ServerProcess


def test_signals(tmp_path: Path) -> None:
    """Frames along the first axis are rows, beside their positions; those along other axes are none."""
    random, folder = np.random.default_rng(0), tmp_path / "data"
    folder.mkdir()
    frames = random.integers(0, 9, (20, 20, 6)).astype("u2")
    with h5py.File(folder / "detector.h5", "w") as file:
        file.create_dataset("entry/data/data", data=frames, chunks=(1, 20, 6), compression="gzip")
    with h5py.File(folder / "scan.nxs", "w") as file:
        entry = file.create_group("entry")
        entry.attrs["NX_class"], entry.attrs["default"], file.attrs["default"] = "NXentry", "data", "entry"
        data = entry.create_group("data")
        data.attrs.update(NX_class="NXdata", signal="frames", auxiliary_signals=["dark"], axes=["omega", "y", "x"])
        data["frames"] = h5py.ExternalLink("detector.h5", "/entry/data/data")
        data["dark"], data["omega"], data["y"], data["x"] = frames[:, 0], np.arange(20.0), np.arange(20.0), np.arange(6)
    process = ServerProcess(folder, tmp_path / "cache")
    with h5feed.connect(process.url, deadline=60) as feed:
        scan = feed["scan"]
        fields = {field["name"]: field for field in scan.info["fields"]}
        roles = {name: field["role"] for name, field in fields.items() if field["readable"]}
        assert roles == {"frames": "input", "dark": "other", "omega": "other"}
        assert fields["frames"]["role_reason"] == "the signal of NXdata"
        assert "positions along axis 1 of 'frames'" in fields["y"]["reason"]
        np.testing.assert_array_equal(scan.take(range(20), fields=["frames"])["frames"], frames)
    assert process.stop() == 0


def test_positions_along_other_axes_are_no_dataset(tmp_path: Path) -> None:
    """Their name may be that of a label, such as `y`."""
    folder = tmp_path / "data"
    folder.mkdir()
    with h5py.File(folder / "scan.nxs", "w") as file:
        data = file.create_group("entry/data")
        data.attrs.update(NX_class="NXdata", signal="counts", axes=["t", "x", "y"])
        data["counts"], data["t"] = np.arange(12 * 5 * 8).reshape(12, 5, 8), np.arange(12.0)
        data["x"], data["y"] = np.arange(5), np.arange(8)
    process = ServerProcess(folder, tmp_path / "cache")
    with h5feed.connect(process.url, deadline=60) as feed:
        assert [entry["name"] for entry in feed.datasets()] == ["scan"]
        fields = {field["name"]: field for field in feed["scan"].info["fields"]}
        assert feed["scan"].rows == 12 and fields["counts"]["role"] == "input"
        for axis, name in ((1, "x"), (2, "y")):
            assert f"positions along axis {axis} of 'counts'" in fields[name]["reason"]
    assert process.stop() == 0
