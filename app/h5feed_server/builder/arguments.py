"""Command-line arguments of ``h5feed-server build``, in a module of its own so that serving does not load HDF5."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """sources:
  FOLDER             a sub-folder of images for each class, also in train/ val/ test/; or the class in the file names
  .zip .tar .tar.gz  archives of such folders, and WebDataset shards; read in place
  .csv .tsv (.gz)    a label column with pixel columns, feature columns, or names of images next to the table
  .npz .npy          x_train, y_train, x_test …
  CIFAR              the folder or the .tar.gz, Python or binary version
  IDX                MNIST's files, or a folder of them, also .gz
  .parquet .arrow    tables, also with Hugging Face's image columns (pip install 'h5feed-server[parquet]')
  .h5 .hdf5 .mat     repacked as the server would serve it, with other chunks, compression, dtype or names

examples:
  h5feed-server build pets/ -o pets.h5                           256×256 pixels, centre crop
  h5feed-server build pets/ -o pets.h5 --val 0.1 --test 0.1      with stratified splits, as by scikit-learn
  h5feed-server build pets.zip -o pets.h5 --size 224 --dry-run   only report what would be built
  h5feed-server build train.csv -o digits.h5 --label-column label
  h5feed-server build labels.csv -o dogs.h5 --image-dir train --image-suffix .jpg
  h5feed-server build pets/ -o out/ --val 2500 --test 2500 --split-files --mean-json out/mean.json
  h5feed-server build old.h5 -o new.h5 --compression zstd        chunks of one row, for shuffled batches
  h5feed-server build pets/ -o pets.h5 --config build.toml       options from a file: size = 224, val = 0.1
  h5feed-server build /nfs/pets -o /nfs/pets.h5 --shards 64 --ray auto    on all nodes of a Ray cluster
  h5feed-server build pets/ -o s3://bucket/data/pets.h5 --shards 8    build on the local disk, and upload
  h5feed-server build s3://bucket/pets -o pets.h5                images in an object store; also archives and tables

To resume an interrupted build, run the same command again. The exit code is 3 if parts of the source were left out.
They are printed with the reasons, and listed in OUT.left-out.tsv. To get exit code 0 instead, pass --allow-missing.
"""


def add_build(commands: Any) -> None:
    """Add the command to the parser."""
    parser = commands.add_parser(
        "build",
        help="build an HDF5 file for training from images, tables or arrays",
        description="Builds an HDF5 file that is fast to train from: contiguous uint8 rows, labels with class names, "
        "splits, file names, image sizes and digests.",
        epilog=EXAMPLES,
    )
    parser.add_argument("source", metavar="SOURCE", help="path or URL of an object store: see below")
    parser.add_argument(
        "-o", "--output", metavar="OUT", required=True, help="the file to build, or its URL in an object store"
    )
    parser.add_argument(
        "--config", metavar="TOML", type=Path, help="file with options; the command line takes precedence"
    )
    parser.add_argument(
        "--ray",
        metavar="ADDRESS",
        help="make the files of --shards on all nodes of a Ray cluster: auto on a node of the cluster, or HOST:PORT of "
        "its head node; see docs/how-to/ray.md",
    )
    parser.add_argument("--dry-run", action="store_true", help="report what would be built; write nothing")

    _add_images(parser.add_argument_group("images"))
    _add_rows(parser.add_argument_group("rows"))
    _add_stored(parser.add_argument_group("storage"))


def _add_images(images: argparse._ArgumentGroup) -> None:
    images.add_argument("--size", metavar="N|HxW", help="size in pixels (default 256)")
    images.add_argument(
        "--resize",
        help="aspect: scale the shorter side to the size, crop the centre (default); stretch; pad: add black borders; "
        "none: keep the shape, which all images must share",
    )
    images.add_argument(
        "--interpolation",
        help="linear, bilinear, area, bicubic, lanczos or nearest (default: bilinear; with --store encoded: linear)",
    )
    images.add_argument(
        "--exact",
        action="store_const",
        const=True,
        help="resize by Pillow, to the last bit; the default is up to three times as fast, and differs by at most one "
        "level",
    )
    images.add_argument(
        "--store", help="pixels (default), or encoded: keep the bytes of JPEG and PNG files; the server decodes them"
    )
    images.add_argument("--colour", help="rgb (default), bgr, grey or rgba")
    images.add_argument(
        "--label-pattern", metavar="REGEX", help=r"its group is the class in a file name, such as '^(\w+)\.\d+'"
    )
    images.add_argument(
        "--image-seconds", metavar="N", type=float, help="time limit for decoding one image (default 60 s)"
    )


def _add_rows(rows: argparse._ArgumentGroup) -> None:
    rows.add_argument(
        "--val", metavar="N", type=_share, help="size of the validation split: a fraction or a number of rows"
    )
    rows.add_argument("--test", metavar="N", type=_share, help="size of the test split, which is taken first")
    rows.add_argument(
        "--no-stratify", dest="stratify", action="store_const", const=False, help="do not stratify the splits by class"
    )
    rows.add_argument(
        "--split-seed", metavar="N", type=int, help="random_state of scikit-learn's splitters (default 42)"
    )
    rows.add_argument(
        "--split-by-position",
        dest="split_shuffle",
        action="store_const",
        const=False,
        help="take test and val from the end, without shuffling",
    )
    rows.add_argument("--limit", metavar="N", type=int, help="use only N rows, equally many of each class and split")
    rows.add_argument("--strict", action="store_const", const=True, help="stop at the first broken row")
    rows.add_argument("--label-column", metavar="NAME", help="column or field of the label (default: guessed)")
    rows.add_argument(
        "--allow-missing",
        action="store_const",
        const=True,
        help="exit with 0 instead of 3 if parts of the source were left out",
    )
    rows.add_argument(
        "--image-dir", metavar="DIR", type=Path, help="folder of the images that a table lists (default: guessed)"
    )
    rows.add_argument(
        "--image-suffix", metavar=".EXT", help="extension to add to the image names in a table (default: guessed)"
    )
    rows.add_argument(
        "--image-column", metavar="NAME", help="column of a table with images or their paths (default: guessed)"
    )
    rows.add_argument(
        "--dataset", metavar="NAME", help="which dataset of an HDF5 file to build, by its name in the server's listing"
    )


def _add_stored(stored: argparse._ArgumentGroup) -> None:
    stored.add_argument(
        "--dtype", help="type such as float32 (default: uint8 for images, otherwise that of the source)"
    )
    stored.add_argument("--rescale", metavar="X", type=float, help="multiply pixels by X; needs a --dtype of floats")
    stored.add_argument(
        "--compression", help="none (default), lz4, zstd or gzip, in chunks of one row or of several small rows"
    )
    stored.add_argument("--level", metavar="N", type=int, help="level of zstd (default 3) or gzip (default 4)")
    stored.add_argument("--chunk-rows", metavar="N", type=int, help="rows per compressed chunk")
    stored.add_argument("--rename", metavar="OLD=NEW", action="append", help="rename a field; can be repeated")
    stored.add_argument("--shards", metavar="N", type=int, help="write N files, name-00000-of-0000N.h5 …")
    stored.add_argument(
        "--split-files",
        action="store_const",
        const=True,
        help="write train.hdf5, val.hdf5 and test.hdf5 into the folder OUT, each with images and labels",
    )
    stored.add_argument(
        "--mean-json", metavar="FILE", type=Path, help="write the channel means of train, with the keys R, G, B"
    )
    stored.add_argument(
        "--overwrite", action="store_const", const=True, help="replace OUT once the new file is complete"
    )
    stored.add_argument(
        "--scratch",
        metavar="DIR",
        type=Path,
        help="folder for files to upload, and for copies of a source in an object store (default: in the cache folder)",
    )
    stored.add_argument("--threads", metavar="N", type=int, help="number of threads (default: number of cores)")


def _share(text: str) -> float | int:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a fraction such as 0.1 nor a number of rows") from None
