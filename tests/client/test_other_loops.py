"""The guide to other loops is run, block by block."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import pytest
from conftest import ServerProcess

GUIDE = Path(__file__).parents[2] / "docs" / "guide" / "other-loops.md"

BLOCK = re.compile(r"(?:<!-- needs: (\w+) -->\n)?```python\n(.*?)```", re.DOTALL)


@pytest.fixture
def digits(serve: Callable[..., ServerProcess], tmp_path: Path) -> ServerProcess:
    """Serves `digits`, as the demo packs them."""
    datasets = pytest.importorskip("sklearn.datasets")
    folder = tmp_path / "data"
    folder.mkdir()
    data = datasets.load_digits()
    with h5py.File(folder / "digits.h5", "w") as file:
        file["images"], file["labels"] = data.images.astype("uint8"), data.target
    return serve(folder)


@pytest.mark.parametrize("need", [None, "jax", "torch", "fastai", "tensorflow"])
def test_the_guide(digits: ServerProcess, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, need: str | None) -> None:
    """All blocks that need nothing else, with those of one framework, from the top to the bottom."""
    if need is not None:
        pytest.importorskip(need)
    monkeypatch.setenv("H5FEED_URL", digits.url)
    monkeypatch.setenv("HOME", str(tmp_path))
    namespace: dict[str, Any] = {"__name__": "guide"}
    # fastai goes on with what the torch part has made.
    wanted = {None, need, "torch" if need == "fastai" else need}
    ran = 0
    for match in BLOCK.finditer(GUIDE.read_text()):
        if match[1] in wanted:
            exec(compile(match[2], f"{GUIDE.name}: {match[2].splitlines()[0]}", "exec"), namespace)
            ran += match[1] == need
    assert ran
    if need == "fastai":
        assert float(namespace["learner"].recorder.values[-1][2]) > 0.7, "it has not learned"
    for name in ("train", "resumed"):
        if hasattr(namespace.get(name), "close"):
            namespace[name].close()
    namespace["feed"].close()
