"""The notebook of `examples/`: it holds no outputs, and runs from the first cell to the last in a real kernel."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import re
import signal
import site
import sys
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from h5feed_server.demo import pack_digits

from tests.support.documentation import ROOT, SECONDS
from tests.support.server_process import ServerProcess

NOTEBOOK = ROOT / "examples" / "colab.ipynb"
ADDRESS = 'SERVER = "http://127.0.0.1:8000"'
TOKEN = "for-the-notebook"


def _cells() -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text())["cells"]
    return cells


def _code() -> dict[str, str]:
    return {cell["id"]: "".join(cell["source"]) for cell in _cells() if cell["cell_type"] == "code"}


def test_it_is_as_written() -> None:
    """No outputs, no counts; every cell is Python or a magic, and the address stands in one place."""
    for cell in _cells():
        assert cell["cell_type"] == "markdown" or (cell["outputs"] == [] and cell["execution_count"] is None)
    code = _code()
    for text in code.values():
        ast.parse(re.sub(r"^%.*$", "pass", text, flags=re.MULTILINE))
    whole = "\n".join(code.values())
    assert whole.count("http") == 1 and ADDRESS in whole
    assert "extra-index-url" not in NOTEBOOK.read_text()


def _kernel(folder: Path) -> None:
    """A kernel in an environment of its own, which has all packages of this one, but not h5feed."""
    venv.create(folder / "venv", with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    # A path is added as it is: the files in it that lead to the packages of this checkout are not read.
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    spec = folder / "kernels" / "fresh"
    spec.mkdir(parents=True)
    argv = [str(python), "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    (spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "fresh", "language": "python"}))


@pytest.fixture
def tensorboards(tmp_path: Path) -> Iterator[Path]:
    """A folder in which TensorBoard writes down its processes, which end with the test."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    yield folder
    for file in folder.glob(".tensorboard-info/pid-*.info"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(json.loads(file.read_text())["pid"]), signal.SIGTERM)


@pytest.mark.slow
def test_it_runs(tmp_path: Path, tensorboards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a server with a token: the client comes from the server, pictures are shown, training resumes."""
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    folder = tmp_path / "data"
    folder.mkdir()
    pack_digits(folder / "digits.h5")
    _kernel(tmp_path)
    (tmp_path / "work").mkdir()
    for name, value in {
        "JUPYTER_PATH": str(tmp_path),
        "IPYTHONDIR": str(tmp_path / "ipython"),
        "PIP_NO_INDEX": "1",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "TENSORBOARD_BINARY": str(Path(sys.executable).with_name("tensorboard")),
        "TMPDIR": str(tensorboards),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("KERAS_BACKEND", raising=False)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    server = ServerProcess(folder, tmp_path / "cache", H5FEED_TOKENS=TOKEN)
    try:
        notebook = nbformat.read(NOTEBOOK, as_version=4)
        nbformat.validate(notebook)
        for cell in notebook.cells:
            cell.source = cell.source.replace(ADDRESS, f'SERVER = "{server.url}"')
            cell.source = cell.source.replace("TOKEN = None", f'TOKEN = "{TOKEN}"')
        where = nbformat.v4.new_code_cell(
            "print(h5feed.__file__, sum(p.stat().st_size for p in Path('logs').iterdir()))"
        )
        notebook.cells.append(where)
        client = nbclient.NotebookClient(
            notebook, timeout=SECONDS, kernel_name="fresh", resources={"metadata": {"path": str(tmp_path / "work")}}
        )
        client.execute()
    finally:
        assert server.stop() == 0
    shown = {cell["id"]: cell.get("outputs", []) for cell in notebook.cells}
    assert str(tmp_path / "venv") in shown[where["id"]][0]["text"]
    for name in ("show", "show-batch", "statistics"):
        (picture,) = [output for output in shown[name] if "data" in output]
        assert picture["data"]["image/png"] and "digits" in picture["metadata"]["image/png"]["alt"]
    assert "digits" in shown["connect"][-1]["data"]["text/html"]
    printed = "".join(output.get("text", "") for output in shown["resume"])
    assert "Epoch 5/6" in printed and "Epoch 4/6" not in printed
    right = re.search(r"([\d.]+)% of 180 are right", "".join(output.get("text", "") for output in shown["test"]))
    assert right and float(right[1]) > 85
    assert any("tensorboard" in str(output).lower() for output in shown["tensorboard"])
