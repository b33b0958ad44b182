"""Build options, shared by the command, the Python function and the TOML file."""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import numpy as np
from h5feed.errors import BadParameter
from h5feed.images import Colour, Interpolation, Resize
from h5feed.suggestions import did_you_mean

Compression = Literal["none", "lz4", "zstd", "gzip"]
Store = Literal["pixels", "encoded"]
Chosen = Literal["auto", "linear", "bilinear", "area", "bicubic", "lanczos", "nearest"]

_DTYPES = ("uint8", "uint16", "float16", "float32", "float64", *(f"int{bits}" for bits in (8, 16, 32, 64)), "uint32")
_MAX_SIDE = 1 << 14
_SIZE = re.compile(r"^\s*(\d+)\s*(?:[x×,]\s*(\d+)\s*)?$")


@dataclass(frozen=True)
class BuildOptions:
    """How to build HDF5 from a source. Invalid combinations are rejected.

    Attributes
    ----------
    size : (int, int)
        Height and width of every image, pixels. Not used by ``resize="none"``.
    resize : {"aspect", "stretch", "pad", "none"}
        ``aspect``: the shorter side to size, then the centre is cropped; ``pad``: the longer side to size, black beside
        it; ``none``: images are taken as they are, and must be alike.
    interpolation : {"auto", "linear", "bilinear", "area", "bicubic", "lanczos", "nearest"}
        See `h5feed.images.ImageSpec`. ``auto`` is ``bilinear``, which averages over the pixels that become one, and
        ``linear`` with ``store="encoded"``: there it is done again in every epoch, at less than half the cost.
    exact : bool
        Resize by Pillow, to the last bit. Otherwise ``bilinear`` is done by `cykooz.resizer` where that is installed,
        in a third of the time; a pixel differs by at most one level. With ``store="encoded"``, always by Pillow.
    colour : {"rgb", "bgr", "grey", "rgba"}
        Order of the channels; recorded in the file.
    dtype : str or None
        Of the images or the features. Default: ``uint8`` for images, else as in the source.
    rescale : float
        What pixels are multiplied by; needs a dtype of floats.
    val, test : float, int or None
        As in the server's split specs: a fraction of all rows, or a count. Stored natively.
    stratify : bool
        Whether val and test hold the classes in equal shares, where there are classes.
    split_seed : int
        ``random_state`` of scikit-learn's splitters.
    split_shuffle : bool
        False: by position, test and val from the end.
    store : {"pixels", "encoded"}
        ``encoded``: JPEG, PNG, BMP, GIF and WebP files are stored byte for byte, which takes less space than pixels.
        The server decodes them with the same decoder as a build; `size`, `resize`, `interpolation` and `colour` are
        recorded for it.
    compression : {"none", "lz4", "zstd", "gzip"}
    level : int or None
        Of zstd (1 … 19) and gzip (1 … 9).
    chunk_rows : int or None
        Rows of a compressed chunk. Default: one for images; of small rows as many as make 32 KiB.
    shards : int
        Files that the rows are spread over, ``name-00000-of-00010.h5``.
    split_files : bool
        One file a split, ``train.hdf5`` and so on, in a folder.
    mean_json : Path or None
        Where the channel means of train go as JSON (keys ``R``, ``G``, ``B``).
    label_column, image_column : str or None
        Names in a table (CSV, Parquet). Default: guessed.
    image_dir : Path or None
        Folder below which the images are that a table names. Default: that of the table.
    image_suffix : str or None
        Ending that is added to the names of a table's images, such as ``.jpg``. Default: guessed.
    label_pattern : str or None
        Regular expression with one group, searched in the names of the files of a flat folder. Default: guessed.
    dataset : str or None
        Which of the datasets in an HDF5 file, where there are several.
    rename : mapping of str to str
        Fields' names in the source, to those in the file.
    image_seconds : float
        That one image may take to be decoded, in a process of its own: what takes longer is broken.
    limit : int or None
        Only the first so many rows, of each class and split equally many, where there are such.
    strict : bool
        Stop at the first row that is broken, instead of leaving it out.
    allow_missing : bool
        Whether the command ends well although rows, columns or fields of the source are left out.
    overwrite : bool
        Whether a file that is there may be replaced, once the new one is whole.
    threads : int or None
        Default: all cores.
    scratch : Path or None
        Folder for what is built before it is uploaded to an object store, and for copies of a source in one. Default:
        ``builds`` in the cache folder.
    """

    size: tuple[int, int] = (256, 256)
    resize: Resize = "aspect"
    interpolation: Chosen = "auto"
    exact: bool = False
    colour: Colour = "rgb"
    dtype: str | None = None
    rescale: float = 1.0
    val: float | int | None = None
    test: float | int | None = None
    stratify: bool = True
    split_seed: int = 42
    split_shuffle: bool = True
    store: Store = "pixels"
    compression: Compression = "none"
    level: int | None = None
    chunk_rows: int | None = None
    shards: int = 1
    split_files: bool = False
    mean_json: Path | None = None
    label_column: str | None = None
    image_column: str | None = None
    image_dir: Path | None = None
    image_suffix: str | None = None
    label_pattern: str | None = None
    dataset: str | None = None
    rename: Mapping[str, str] | None = None
    image_seconds: float = 60.0
    limit: int | None = None
    strict: bool = False
    allow_missing: bool = False
    overwrite: bool = False
    threads: int | None = None
    scratch: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", parse_size(self.size))
        self._check_choices()
        self._check_numbers()
        self._check_splits()
        self._check_level()
        self._check_store()
        if self.split_files and self.shards > 1:
            raise BadParameter("split_files and shards cannot be combined: both divide the rows into files")
        self._check_label_pattern()

    def _check_choices(self) -> None:
        hints = get_type_hints(type(self))
        for name in ("resize", "interpolation", "colour", "compression", "store"):
            _check(name, getattr(self, name) in get_args(hints[name]), getattr(self, name), get_args(hints[name]))
        if self.exact and self.resampling == "linear":
            raise BadParameter("exact=True cannot be combined with interpolation=linear, which OpenCV computes")
        if self.dtype is not None:
            _check("dtype", self.dtype in _DTYPES, self.dtype, _DTYPES)

    def _check_numbers(self) -> None:
        scales = self.dtype is not None and np.dtype(self.dtype).kind == "f"
        if self.rescale != 1.0 and not scales:
            raise BadParameter(f"rescale={self.rescale:g} needs dtype float16, float32 or float64, not {self.dtype}")
        for name in ("chunk_rows", "shards", "limit", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise BadParameter(f"{name}={value} must be 1 or more")
        if not 0 < self.image_seconds < float("inf"):
            raise BadParameter(f"image_seconds={self.image_seconds:g} must be greater than 0")
        if self.shards > 99_999:
            raise BadParameter(f"shards={self.shards} must be less than 100,000")
        if not 0 <= self.split_seed < 2**32:
            raise BadParameter(f"split_seed={self.split_seed} must be in 0 … 2³²-1")

    def _check_splits(self) -> None:
        if self.val is None and self.test is None:
            for name, default in (("stratify", True), ("split_seed", 42), ("split_shuffle", True)):
                if getattr(self, name) != default:
                    raise BadParameter(f"{name}={getattr(self, name)} needs val or test: otherwise no splits are drawn")

    def _check_level(self) -> None:
        levels = {"zstd": 19, "gzip": 9}
        if self.level is not None and not 1 <= self.level <= levels.get(self.compression, 0):
            known = ", ".join(f"1 … {most} with {name}" for name, most in levels.items())
            raise BadParameter(f"level={self.level} must be in {known}; compression is {self.compression}")

    def _check_store(self) -> None:
        if self.store != "encoded":
            return
        for name, usual in (("dtype", None), ("rescale", 1.0), ("compression", "none")):
            if getattr(self, name) != usual:
                raise BadParameter(
                    f"{name}={getattr(self, name)} cannot be combined with store=encoded: it needs pixels"
                )
        if self.resize == "none":
            raise BadParameter("resize=none cannot be combined with store=encoded: all images are served in one shape")

    def _check_label_pattern(self) -> None:
        if self.label_pattern is None:
            return
        try:
            groups = re.compile(self.label_pattern).groups
        except re.error as error:
            raise BadParameter(f"label_pattern={self.label_pattern!r} is not a regular expression: {error}") from None
        if groups < 1:
            raise BadParameter(f"label_pattern={self.label_pattern!r} needs a group for the part that is the class")

    @property
    def resampling(self) -> Interpolation:
        """The interpolation to use."""
        if self.interpolation == "auto":
            return "linear" if self.store == "encoded" else "bilinear"
        return self.interpolation

    @property
    def workers(self) -> int:
        """Number of decoding threads."""
        return self.threads or len(os.sched_getaffinity(0))

    def about(self) -> dict[str, Any]:
        """The options that affect the bytes of the output."""
        kept = {item.name: getattr(self, item.name) for item in fields(self)}
        for name in ("strict", "allow_missing", "overwrite", "threads", "mean_json", "scratch"):
            del kept[name]
        kept["image_dir"] = None if self.image_dir is None else str(self.image_dir)
        return {**kept, "size": list(self.size), "rename": dict(self.rename or {})}


def parse_size(value: Any) -> tuple[int, int]:
    """Height and width in pixels from ``256``, ``"256"``, ``"240x320"`` or ``(240, 320)``.

    Raises
    ------
    BadParameter
    """
    sides: tuple[int, ...] = ()
    if isinstance(value, str) and (match := _SIZE.match(value)):
        sides = (int(match[1]), int(match[2] or match[1]))
    elif isinstance(value, int):
        sides = (value, value)
    elif isinstance(value, list | tuple) and all(isinstance(side, int) for side in value):
        sides = tuple(value)
    if len(sides) != 2 or not all(1 <= side <= _MAX_SIDE for side in sides):
        raise BadParameter(f"size={value!r} must be pixels such as 256, or height×width such as 240x320")
    return sides[0], sides[1]


def read_options(path: Path) -> dict[str, Any]:
    """Options from a TOML file, named as in `BuildOptions`; dashes may replace underscores.

    Raises
    ------
    BadParameter
    """
    try:
        with open(path, "rb") as stream:
            table = tomllib.load(stream)
    except OSError as error:
        raise BadParameter(f"the options file {path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise BadParameter(f"the options file {path} has lists or tables that are nested too deeply") from None
    except ValueError as error:
        raise BadParameter(f"the options file {path} is not valid TOML: {error}") from None
    hints = get_type_hints(BuildOptions)
    options: dict[str, Any] = {}
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in hints:
            said = did_you_mean(key, hints, f"the options are {', '.join(hints)}")
            raise BadParameter(f"{path}: there is no option {key!r}: {said}")
        if name == "rename" and isinstance(value, dict):
            options[name] = value
            continue
        wanted = (int, float) if hints[name] is float else _types(hints[name])
        if name != "size" and (not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted)):
            raise BadParameter(f"{path}: {key} = {value!r} has the wrong type")
        options[name] = Path(value) if name in ("mean_json", "image_dir", "scratch") else value
    return options


def _types(hint: Any) -> tuple[type, ...]:
    """TOML types allowed by a type hint."""
    plain: dict[Any, type] = {Path: str, Mapping: dict}
    kinds = [kind for kind in get_args(hint) or (hint,) if kind is not type(None)]
    if all(isinstance(kind, str) for kind in kinds):
        return (str,)
    return tuple(plain.get(kind, kind) for kind in kinds if isinstance(kind, type))


def _check(name: str, good: bool, value: Any, valid: tuple[Any, ...]) -> None:
    if not good:
        raise BadParameter(f"{name}={value!r} must be one of {', '.join(map(str, valid))}")
