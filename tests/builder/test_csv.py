"""Tables as people have them: what their owner means is what is built, what was guessed is said, nothing is lost."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from h5feed.errors import BadParameter, Unreadable
from h5feed_server.builder import BuildOptions, Report, build, preview

from tests.support.photographs import encoded

OPTIONS = BuildOptions((16, 16))


def _table(path: Path, *lines: object, encoding: str = "utf-8") -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), encoding=encoding)
    return path


def _built(source: Path, options: BuildOptions = OPTIONS) -> tuple[Report, dict[str, Any]]:
    """The report, and all fields; a dry run says the same of both."""
    out = source.parent / "out.h5"
    before = preview(source, out, options)
    report = build(source, out, options)
    notes = tuple(note for note in before.notes if "rows were tried" not in note)
    assert (before.rows, before.left_out, notes) == (report.rows, report.left_out, report.notes)
    fields: dict[str, Any] = {}
    with h5py.File(out) as file:
        file.visititems(lambda name, item: fields.update({name: item[()]} if isinstance(item, h5py.Dataset) else {}))
        fields["classes"] = {
            name: item.attrs["class_names"].tolist() for name, item in file.items() if "class_names" in item.attrs
        }
    out.unlink()
    return report, fields


def _images(folder: Path, *names: str) -> dict[str, Any]:
    """PNGs of one colour each, by their names."""
    found = {}
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.full((16, 16, 3), 10 * number + 5, np.uint8)
        (folder / name).write_bytes(encoded(pixels, "PNG"))
        found[name] = pixels
    return found


def test_running_numbers_are_no_features(tmp_path: Path) -> None:
    """The index that pandas writes without a name, and ids: fields of their own."""
    lines = [f"{row},{900 + row},{row / 4},{row % 2}" for row in range(20)]
    report, fields = _built(_table(tmp_path / "a.csv", ",PassengerId,fare,survived", *lines))
    assert fields["features"].tolist() == [[row / 4] for row in range(20)]
    assert fields["index"].tolist() == list(range(20)) and fields["PassengerId"].tolist() == list(range(900, 920))
    assert fields["labels"].tolist() == [row % 2 for row in range(20)]
    assert any("'survived'" in note for note in report.notes) and any("'PassengerId'" in note for note in report.notes)


def test_ids_of_hexadecimal_digits_keep_their_rows(tmp_path: Path) -> None:
    """``1e5`` and ``12`` among them are no numbers; those that begin with zeros keep these."""
    ids = ["1e5", "12", "0a3f", "00e1", "777", "beef"] * 5
    lines = [f"{own},{row},{row % 3}" for row, own in enumerate(ids)]
    report, fields = _built(_table(tmp_path / "a.csv", "id,x,label", *lines))
    assert report.rows == {"": 30} and not report.left_out
    assert [own.decode() for own in fields["id"]] == ids
    assert fields["features"].tolist() == [[row] for row in range(30)]
    _, fields = _built(_table(tmp_path / "b.csv", "code,x,label", *lines))
    assert [own.decode() for own in fields["code"]] == ids, "and so whatever the column is called"


@pytest.mark.parametrize("missing", ["", "NA", "NaN", "null", "None", "n/a", "<NA>", "#N/A"])
def test_what_is_missing_is_nan_as_in_pandas(tmp_path: Path, missing: str) -> None:
    """One of them makes no column a column of texts; means are of the others, and so are deviations."""
    lines = [f"{missing if row == 7 else row},{row * 1.5},{row % 2}" for row in range(20)]
    report, fields = _built(_table(tmp_path / "a.csv", "age,fare,label", *lines))
    assert fields["features"].shape == (20, 2) and np.isnan(fields["features"]).sum() == 1
    assert math.isnan(fields["features"][7, 0])
    np.testing.assert_allclose(report.means["mean"], [np.nanmean(fields["features"])], rtol=1e-6)
    np.testing.assert_allclose(report.means["std"], [np.nanstd(fields["features"])], rtol=1e-6)
    assert any("1 values are missing" in note for note in report.notes)


def test_a_column_without_a_value_has_no_mean(tmp_path: Path) -> None:
    report, fields = _built(_table(tmp_path / "a.csv", "x,label", *(f",{row % 2}" for row in range(9))))
    assert np.isnan(fields["features"]).all()
    assert all(map(math.isnan, [*report.means["mean"], *report.means["std"]]))


def test_texts_truths_and_large_numbers_are_fields_of_their_own(tmp_path: Path) -> None:
    lines = ["when,who,large,huge,beyond,yes,x,label"]
    for row in range(12):
        yes = "True" if row % 3 else "False"
        lines.append(
            f'2024-01-{row + 1:02d},"a\nb {row}",{2**60 + row},{2**63 + row},{10**30 + row},{yes},{row},{row % 2}'
        )
    report, fields = _built(_table(tmp_path / "a.csv", *lines))
    assert report.rows == {"": 12} and not report.left_out
    assert fields["features"].tolist() == [[float(row % 3 != 0), row] for row in range(12)]
    assert fields["when"][3] == b"2024-01-04" and fields["who"][3] == b"a\nb 3"
    assert fields["large"].tolist() == [2**60 + row for row in range(12)]
    assert fields["huge"].tolist() == [2**63 + row for row in range(12)]
    assert fields["beyond"][3].decode() == str(10**30 + 3)
    assert any("'when'" in note for note in report.notes)


def test_whole_numbers_that_float32_does_not_have_are_float64(tmp_path: Path) -> None:
    lines = [f"{2**24 + 1 + row},{row % 2}" for row in range(8)]
    _, fields = _built(_table(tmp_path / "a.csv", "x,label", *lines))
    assert fields["features"].tolist() == [[2**24 + 1 + row] for row in range(8)]


def test_numbers_that_float32_would_make_equal_are_float64(tmp_path: Path) -> None:
    """Points in time, and whole numbers among fractions; floats of few digits stay float32."""
    for column, dtype in (
        ([1577836800.5 + row for row in range(50)], "f8"),
        ([0.1, 16777217, 3] * 5, "f8"),
        ([100000 + row / 1024 + 0.0001 for row in range(50)], "f8"),
        ([20 + row / 10 for row in range(50)], "f4"),
        ([2.0**30 * row for row in range(50)], "f4"),
        ([0.1] * 20, "f4"),
    ):
        lines = [f"{value!r},{row % 2}" for row, value in enumerate(column)]
        report, fields = _built(_table(tmp_path / "a.csv", "t,label", *lines))
        assert fields["features"].dtype == dtype, column[:3]
        np.testing.assert_array_equal(fields["features"][:, 0], np.array(column, dtype))
        assert any("'t'" in note and "float64" in note for note in report.notes) == (dtype == "f8")


def test_large_numbers_with_exponents_are_features(tmp_path: Path) -> None:
    """What is written as floats are is a float, however large; infinite, too."""
    lines = [f"{row + 1}.5e20,{2 * row}e300,{row % 2}" for row in range(12)]
    report, fields = _built(_table(tmp_path / "a.csv", "mass,luminosity,label", *lines))
    assert fields["features"].tolist() == [[float(f"{row + 1}.5e20"), float(f"{2 * row}e300")] for row in range(12)]
    assert not report.left_out and not any("2⁵³" in note for note in report.notes)
    _, fields = _built(_table(tmp_path / "b.csv", "far,label", *[f"1e400,{row % 2}" for row in range(12)]))
    assert fields["features"].tolist() == [[math.inf]] * 12


def test_long_whole_numbers_beside_a_label_are_a_field(tmp_path: Path) -> None:
    lines = [f"{2**53 + 1 + row},{row % 2}" for row in range(12)]
    _, fields = _built(_table(tmp_path / "a.csv", "a,label", *lines))
    assert fields["a"].tolist() == [2**53 + 1 + row for row in range(12)]
    assert fields["labels"].tolist() == [row % 2 for row in range(12)]


def test_without_a_name_that_says_label_it_is_asked_for(tmp_path: Path) -> None:
    lines = [f"{row},{row * 2},{row % 3}" for row in range(12)]
    source = _table(tmp_path / "a.csv", "a,b,worth", *lines)
    report, fields = _built(source)
    assert "labels" not in fields and fields["features"].shape == (12, 3)
    assert any("label_column" in note and "'worth'" in note for note in report.notes)
    _, fields = _built(source, BuildOptions(label_column="worth"))
    assert fields["labels"].tolist() == [row % 3 for row in range(12)] and fields["features"].shape == (12, 2)
    with pytest.raises(BadParameter, match=r"label_column='c' is not a column of a\.csv: choose from a, b, worth"):
        _built(source, BuildOptions(label_column="c"))


def test_faces_whose_pixels_are_one_column(tmp_path: Path) -> None:
    """FER-2013: ``emotion,pixels,Usage``."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 48, 48), np.uint8)
    usage = ["Training"] * 15 + ["PublicTest"] * 5 + ["PrivateTest"] * 10
    lines = [f"{row % 7},{' '.join(map(str, pixels[row].ravel()))},{usage[row]}" for row in range(30)]
    report, fields = _built(_table(tmp_path / "fer2013.csv", "emotion,pixels,Usage", *lines))
    assert report.rows == {"train": 15, "val": 5, "test": 10}
    for split, rows in (("train", slice(0, 15)), ("val", slice(15, 20)), ("test", slice(20, 30))):
        np.testing.assert_array_equal(fields[f"{split}/images"], pixels[rows])
        assert fields[f"{split}/images"].dtype == np.uint8
        assert fields[f"{split}/labels"].tolist() == [row % 7 for row in range(30)][rows]


@pytest.mark.parametrize(
    ("files", "values", "header"),
    [
        (["train/a1.png", "train/b2.png", "test/c3.png"], ["a1", "b2"], "id,breed"),  # dog-breed
        (["train/1000.png", "train/1001.png"], ["train/1000.png", "train/1001.png"], "image_id,label"),
        (["train_images/7.png", "train_images/9.png", "test_images/7.png"], ["7.png", "9.png"], "image_id,label"),
        (["imgs/x 1.png", "imgs/x 2.png"], [r"imgs\x 1.png", r".\imgs\x 2.png"], "filename,label"),
        (["jpeg/train/7.png", "jpeg/train/9.png"], ["7", "9"], "image_name,label"),
    ],
)
def test_images_beside_a_table_are_found(tmp_path: Path, files: list[str], values: list[str], header: str) -> None:
    """By names with or without endings and folders; where from is said."""
    pixels = _images(tmp_path, *files)
    source = _table(tmp_path / "train.csv", header, f"{values[0]},emu", f"{values[1]},cat")
    _, fields = _built(source)
    assert [name.decode() for name in fields["filenames"]] == files[:2]
    np.testing.assert_array_equal(fields["images"], [pixels[file] for file in files[:2]])
    assert fields["labels"].tolist() == [1, 0] and fields["classes"] == {"labels": ["cat", "emu"]}


def test_where_images_are_is_asked_for_if_it_is_not_certain(tmp_path: Path) -> None:
    pixels = _images(tmp_path, "left/1.png", "right/1.png")
    source = _table(tmp_path / "eyes.csv", "image,label", "1.png,0")
    with pytest.raises(BadParameter, match="could be in 'left/', 'right/': choose one with image_dir"):
        _built(source)
    _, fields = _built(source, BuildOptions((16, 16), image_dir=tmp_path / "right"))
    np.testing.assert_array_equal(fields["images"], [pixels["right/1.png"]])
    _table(tmp_path / "eyes.csv", "image,label", "1,0")
    _images(tmp_path, "right/1.jpg")
    options = BuildOptions((16, 16), image_dir=tmp_path / "right", image_suffix="png")
    assert _built(source, options)[1]["filenames"].tolist() == [b"1.png"]
    with pytest.raises(Unreadable, match=r"none of the 1 images.*image_dir"):
        _built(_table(tmp_path / "none.csv", "image,label", "no/such.png,0"))


def test_columns_beside_images_are_kept(tmp_path: Path) -> None:
    _images(tmp_path, *(f"train/{row}.png" for row in range(6)))
    lines = [f"{row},{row / 2},{'x' * row},{row % 2}" for row in range(6)]
    report, fields = _built(_table(tmp_path / "train.csv", "Id,age,note,label", *lines))
    assert fields["age"].tolist() == [row / 2 for row in range(6)] and not report.left_out
    assert [note.decode() for note in fields["note"]] == ["x" * row for row in range(6)]


def test_columns_of_zero_and_one_beside_images_are_classes(tmp_path: Path) -> None:
    _images(tmp_path, *(f"train/{row}.png" for row in range(6)))
    lines = [f"{row},{row % 2},{int(row > 2)},0" for row in range(6)]
    _, fields = _built(_table(tmp_path / "train.csv", "image_id,healthy,rust,scab", *lines))
    assert fields["labels"].tolist() == [[row % 2, int(row > 2), 0] for row in range(6)]
    assert fields["classes"] == {"labels": ["healthy", "rust", "scab"]}


def test_images_that_are_not_there_are_lost_rows(tmp_path: Path) -> None:
    _images(tmp_path, *(f"train/{row}.png" for row in range(6)))
    lines = [f"{row},{row % 2}" for row in range(8)]
    report, _ = _built(_table(tmp_path / "train.csv", "id,label", *lines))
    assert report.rows == {"": 6} and report.left_out == dict.fromkeys(("6", "7"), "there is no such file")


def test_encodings_delimiters_and_names_of_columns(tmp_path: Path) -> None:
    lines = ['"größe";x;x;kind', *(f'{row},5;{row};{-row};"{"ja;nein" if row % 2 else "süß"}"' for row in range(10))]
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "latin-1"):
        options = BuildOptions(label_column="kind")
        report, fields = _built(_table(tmp_path / "a.csv", *lines, encoding=encoding), options)
        assert fields["features"].tolist() == [[row + 0.5, row, -row] for row in range(10)]
        assert fields["classes"] == {"labels": ["ja;nein", "süß"]}
        assert any("latin-1" in note for note in report.notes) == (encoding == "latin-1")
        assert any("'x.1'" in note for note in report.notes)


def test_a_header_of_numbers_is_a_header(tmp_path: Path) -> None:
    """Columns ``0`` … ``783`` after ``label``."""
    lines = [",".join(map(str, [row % 3, *range(row, row + 64)])) for row in range(9)]
    report, fields = _built(_table(tmp_path / "a.csv", ",".join(["label", *map(str, range(64))]), *lines))
    assert report.rows == {"": 9} and fields["labels"].tolist() == [row % 3 for row in range(9)]
    assert fields["images"].shape == (9, 8, 8)


def test_texts_alone(tmp_path: Path) -> None:
    lines = [f'"review, {row}",{"good" if row % 2 else "bad"}' for row in range(8)]
    _, fields = _built(_table(tmp_path / "a.csv", "text,sentiment", *lines))
    assert [text.decode() for text in fields["text"]] == [f"review, {row}" for row in range(8)]
    assert fields["labels"].tolist() == [row % 2 for row in range(8)] and fields["classes"] == {
        "labels": ["bad", "good"]
    }


def test_many_rows_are_what_the_csv_module_reads(tmp_path: Path) -> None:
    """Over several blocks, with a line that is ragged in each."""
    values = np.random.default_rng(3).normal(size=(20_000, 40))
    with open(tmp_path / "a.csv", "w", newline="") as stream:
        table = csv.writer(stream)
        table.writerow([*(f"f{column}" for column in range(40)), "label"])
        for row, own in enumerate(values.tolist()):
            table.writerow([*own, row % 5] if row % 7000 else [1, 2])
    report, fields = _built(tmp_path / "a.csv", BuildOptions(dtype="float64"))
    kept = np.flatnonzero(np.arange(20_000) % 7000)
    np.testing.assert_array_equal(fields["features"], values[kept])
    assert fields["labels"].tolist() == (kept % 5).tolist()
    assert list(report.left_out) == ["line 2", "line 7002", "line 14002"]
