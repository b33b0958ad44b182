"""Command-line arguments of ``h5feed-server build``, in a module of its own so that serving does not load HDF5."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """sources:
  FOLDER             a sub-folder for each class; train/ val/ test/ above those; or the class in the files' names
  .zip .tar .tar.gz  of any of these, and WebDataset shards; read in place
  .csv .tsv (.gz)    a label column, and pixel or feature columns, or names of images that lie beside it
  .npz .npy          x_train, y_train, x_test …
  CIFAR              the folder or .tar.gz, Python's or the binary version
  IDX                MNIST's own files, or a folder of them; .gz too
  .parquet .arrow    Hugging Face's image columns too (pip install 'h5feed-server[parquet]')
  .h5 .hdf5 .mat     repacked: other chunks, compression, dtype, names; fields and rows are those that are served

examples:
  h5feed-server build pets/ -o pets.h5                           256×256, the centre of each image
  h5feed-server build pets/ -o pets.h5 --val 0.1 --test 0.1      with stratified splits, scikit-learn's
  h5feed-server build pets.zip -o pets.h5 --size 224 --dry-run   what would be built; nothing is written
  h5feed-server build train.csv -o digits.h5 --label-column label
  h5feed-server build labels.csv -o dogs.h5 --image-dir train --image-suffix .jpg
  h5feed-server build pets/ -o out/ --val 2500 --test 2500 --split-files --mean-json out/mean.json
  h5feed-server build old.h5 -o new.h5 --compression zstd        chunks of one row, for shuffled batches
  h5feed-server build pets/ -o pets.h5 --config build.toml       options by name: size = 224, val = 0.1

Interrupted or killed, the same command goes on where it ended. It ends with 3 where something of the source is not in
the file: what, and why, is printed and stands in OUT.left-out.tsv. --allow-missing where that is meant.
"""


def add_build(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "build",
        help="make an HDF5 file laid out for training from images, tables or arrays",
        description="Makes an HDF5 file laid out for training: contiguous uint8 rows, labels with the names of their "
        "classes, splits, file names, sizes and digests.",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", type=Path)
    parser.add_argument("-o", "--output", metavar="OUT", type=Path, required=True, help="file; it appears when whole")
    parser.add_argument("--config", metavar="TOML", type=Path, help="options from a file; those given here come first")
    parser.add_argument("--dry-run", action="store_true", help="say what would be built, and write nothing")

    _add_images(parser.add_argument_group("images"))
    _add_rows(parser.add_argument_group("rows"))
    _add_stored(parser.add_argument_group("how it is stored"))


def _add_images(images: argparse._ArgumentGroup) -> None:
    images.add_argument("--size", metavar="N|HxW", help="pixels (default 256)")
    images.add_argument(
        "--resize",
        help="aspect: shorter side to size, centre crop (default); stretch; pad with black; none: all are alike",
    )
    images.add_argument(
        "--interpolation",
        help="linear, bilinear, area, bicubic, lanczos or nearest; default: bilinear, or linear with encoded",
    )
    images.add_argument(
        "--store", help="pixels (default), or encoded: keep JPEG and PNG bytes as they are, decode them when served"
    )
    images.add_argument("--colour", help="rgb (default), bgr, grey or rgba")
    images.add_argument("--label-pattern", metavar="REGEX", help=r"class in the name of a file, such as '^(\w+)\.\d+'")
    images.add_argument(
        "--image-seconds", metavar="N", type=float, help="an image that takes longer to decode is broken (60)"
    )


def _add_rows(rows: argparse._ArgumentGroup) -> None:
    rows.add_argument("--val", metavar="N", type=_share, help="validation split: a fraction of all rows, or a count")
    rows.add_argument("--test", metavar="N", type=_share, help="test split, carved off first")
    rows.add_argument("--no-stratify", dest="stratify", action="store_const", const=False, help="split without classes")
    rows.add_argument("--split-seed", metavar="N", type=int, help="random_state of scikit-learn's splitters (42)")
    rows.add_argument(
        "--split-by-position", dest="split_shuffle", action="store_const", const=False, help="test and val from the end"
    )
    rows.add_argument("--limit", metavar="N", type=int, help="so many rows, of every class and split equally many")
    rows.add_argument("--strict", action="store_const", const=True, help="stop at the first broken row")
    rows.add_argument("--label-column", metavar="NAME", help="of a table (default: guessed)")
    rows.add_argument(
        "--allow-missing",
        action="store_const",
        const=True,
        help="end with 0 although something of the source is left out; else with 3, and the file is there all the same",
    )
    rows.add_argument("--image-dir", metavar="DIR", type=Path, help="below which a table's images are (guessed)")
    rows.add_argument("--image-suffix", metavar=".EXT", help="that is added to the names of a table's images (guessed)")
    rows.add_argument("--image-column", metavar="NAME", help="of a table: paths or images (default: guessed)")
    rows.add_argument("--dataset", metavar="NAME", help="of an HDF5 file that holds several, as the server lists them")


def _add_stored(stored: argparse._ArgumentGroup) -> None:
    stored.add_argument("--dtype", help="such as float32 (default: uint8 for images, else the source's)")
    stored.add_argument("--rescale", metavar="X", type=float, help="multiply pixels; needs a dtype of floats")
    stored.add_argument("--compression", help="none (default), lz4, zstd or gzip; chunks of one row, or 32 KiB")
    stored.add_argument("--level", metavar="N", type=int, help="of zstd (3) or gzip (4)")
    stored.add_argument("--chunk-rows", metavar="N", type=int, help="rows of a compressed chunk")
    stored.add_argument("--rename", metavar="OLD=NEW", action="append", help="a field's name; may be given again")
    stored.add_argument("--shards", metavar="N", type=int, help="files name-00000-of-0000N.h5")
    stored.add_argument(
        "--split-files",
        action="store_const",
        const=True,
        help="train.hdf5, val.hdf5 and test.hdf5 in the folder OUT, each with images and labels",
    )
    stored.add_argument("--mean-json", metavar="FILE", type=Path, help="channel means of train, keys R, G, B")
    stored.add_argument("--overwrite", action="store_const", const=True, help="replace OUT, once the new one is whole")
    stored.add_argument("--threads", metavar="N", type=int, help="default: all cores")


def _share(text: str) -> float | int:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction such as 0.1 nor a count") from None
