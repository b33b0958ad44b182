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
        scan = feed["scan.entry.data"]
        fields = {field["name"]: field for field in scan.info["fields"]}
        roles = {name: field["role"] for name, field in fields.items() if field["readable"]}
        assert roles == {"frames": "input", "dark": "other", "omega": "other"}
        assert fields["frames"]["role_reason"] == "the signal of NXdata"
        assert "positions along axis 1 of 'frames'" in fields["y"]["reason"]
        np.testing.assert_array_equal(scan.take(range(20), fields=["frames"])["frames"], frames)
    assert process.stop() == 0
