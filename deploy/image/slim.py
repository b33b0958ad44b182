"""Removes files that the server never uses from a virtual environment. The image build runs it with that environment's
Python.

Only files that are listed here are removed. `check_image.py` then tests the rest. Measured sizes are in
docs/how-to/deploy.md.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = Path(sysconfig.get_path("purelib"))

CODECS = frozenset(
    f"_{name}"
    for name in (
        *("aec", "bitshuffle", "blosc", "blosc2", "bz2", "deflate", "h5checksum", "imcd", "lz4", "lzf", "png"),
        *("shared", "shared_cython", "szip", "zlib", "zstd"),
    )
)
"""Modules of imagecodecs that HDF5 filters and PNG files need. The others are for formats that h5feed does not read."""

TESTS = ("*/tests", "*/*/tests", "*/*/*/tests", "numpy/f2py", "numpy/_core/include", "numpy/_core/lib")
SOURCES = tuple(f"**/*.{suffix}" for suffix in ("pyi", "pyx", "pxd", "pxi", "c", "h", "a"))
"""Tests of other packages, and what is needed to compile against them."""

# fontTools subsets fonts for PDF files. matplotlib always imports its glyph table, so this part stays.
PLOTS = (
    *("fontTools/[!_m]*/", "fontTools/merge", "fontTools/mtiLib", "fontTools/misc/*.so"),
    *(f"matplotlib/mpl-data/{name}" for name in ("sample_data", "fonts/afm", "fonts/pdfcorefonts", "images")),
    *(f"matplotlib/backends/backend_{kind}*" for kind in ("gtk", "macosx", "nbagg", "pdf", "pgf", "ps", "qt", "tk")),
    *(f"matplotlib/backends/backend_{kind}*" for kind in ("web", "wx", "cairo")),
    *(f"matplotlib/backends/{name}" for name in ("_backend_tk*", "_tkagg*", "_macosx*", "_backend_gtk*")),
    *(f"matplotlib/backends/{name}" for name in ("web_backend", "qt_editor")),
)
"""Parts of matplotlib for anything other than SVG and PNG with the default font."""

OTHERS = ("cv2/data", "cv2/gapi", "cv2/typing", "PIL/_avif*", "pillow.libs/libavif*", "pygments", "pygments-*")
"""Face detection, AVIF images, syntax highlighting."""

FONTS = frozenset({"DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "LastResortHE-Regular.ttf"})


def main() -> None:
    before = _size()
    for pattern in (*TESTS, *SOURCES, *PLOTS, *OTHERS):
        _remove(PACKAGES.glob(pattern))
    _remove(path for path in PACKAGES.glob("matplotlib/mpl-data/fonts/ttf/*") if path.name not in FONTS)
    _remove(path for path in PACKAGES.glob("imagecodecs/_*.so") if path.name.partition(".")[0] not in CODECS)
    _remove(_libraries_without_user("imagecodecs"))
    _remove(_libraries_without_user("pillow", "PIL"))
    _strip()
    print(f"removed {(before - _size()) >> 20} of {before >> 20} MiB")


def _libraries_without_user(project: str, package: str | None = None) -> Iterator[Path]:
    """Shared libraries of a wheel that none of its modules needs, directly or indirectly."""
    folder = PACKAGES / f"{project}.libs"
    needed: set[str] = set()
    for module in (PACKAGES / (package or project)).rglob("*.so"):
        linked = subprocess.run(["ldd", module], capture_output=True, text=True, check=True).stdout
        needed |= {line.split()[0] for line in linked.splitlines() if line.strip()}
    return (path for path in folder.iterdir() if path.name not in needed)


def _strip() -> None:
    """Remove debug symbols from modules. Libraries of wheels are left alone: their tables have been rewritten."""
    modules = [path for path in PACKAGES.rglob("*.so") if not path.relative_to(PACKAGES).parts[0].endswith(".libs")]
    subprocess.run(["strip", "--strip-unneeded", *modules], check=True)


def _remove(paths: Iterator[Path]) -> None:
    for path in list(paths):
        if path.is_dir():
            shutil.rmtree(path)
        elif path.exists():
            path.unlink()


def _size() -> int:
    return sum(path.lstat().st_size for path in Path(sys.prefix).rglob("*"))


if __name__ == "__main__":
    main()
