"""``where``: which rows a filter keeps, held against numpy, and that it does so wherever rows are named."""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import h5feed
import h5py
import httpx
import numpy as np
import numpy.typing as npt
import pytest
from h5feed.errors import BadParameter
from h5feed_server.filters.grammar import MAX_CHARS, MAX_CONDITIONS, MAX_ITEMS, InvalidCondition, canonical, parse
from h5feed_server.filters.masks import QUICK_BYTES, cut_text
from h5feed_server.filters.predicates import bind
from h5feed_server.services import Services
from h5feed_server.settings import Settings
from h5feed_server.splits.split_spec import FilteredSpec
from hypothesis import given
from hypothesis import strategies as st

from tests.support.server_process import ServerProcess
from tests.support.waiting import wait_until

Column = npt.NDArray[Any]

ROWS = 101
INTEGERS = ("?", "i1", "u1", "<i2", ">u2", "<i4", ">i4", "<u4", "<i8", ">i8", "<u8")
FLOATS = ("<f2", "<f4", ">f4", "<f8")
TEXTS = ("fixed", "any")

_SIGNS: dict[str, Callable[[Any, Any], Any]] = {
    "=": lambda a, b: a == b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def _column(kind: str) -> Column:
    """Values at the edges of a dtype, and between them."""
    dice = np.random.default_rng(len(kind) + ord(kind[-1]))
    dtype = np.dtype(kind)
    if dtype.kind == "b":
        return dice.random(ROWS) < 0.3
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        edges = [bounds.min, bounds.max, bounds.max - 1, 0, 1, 2, 3, 4, 5, min(bounds.max, 2**53 + 1)]
        return np.array(edges * 9 + dice.integers(0, 50, ROWS - 90).tolist(), dtype)
    limits = np.finfo(dtype)
    numbers: list[Any] = [
        math.nan,
        math.inf,
        -math.inf,
        0.0,
        -0.0,
        0.1,
        -1.5,
        2,
        3,
        limits.max,
        limits.smallest_subnormal,
    ]
    return np.array(numbers * 9 + dice.normal(size=ROWS - 99).tolist()).astype(dtype)


WORDS = ["", "a", "ab", "abc", "abcd", "b", "B", "ä", "äb", "日本", "🙂", "5", "05", "nan", "the end", 'a "b"', "z"]


@pytest.fixture(scope="module")
def columns() -> dict[str, Column]:
    """A column of each dtype, by the name of its field."""
    found = {f"f_{kind.replace('?', 'b').replace('<', 'l').replace('>', 'g')}": _column(kind) for kind in INTEGERS}
    found |= {f"f_{kind.replace('<', 'l').replace('>', 'g')}": _column(kind) for kind in FLOATS}
    texts = np.random.default_rng(5).choice(np.array(WORDS, object), ROWS)
    return found | {"fixed": np.array([text.encode() for text in texts]), "any": texts}


@pytest.fixture(scope="module")
def services(columns: dict[str, Column], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Services]:
    """What a worker has, over one dataset `columns`."""
    folder = tmp_path_factory.mktemp("columns")
    with h5py.File(folder / "columns.h5", "w") as file:
        for name, values in columns.items():
            if values.dtype.kind == "O":
                file.create_dataset(name, data=values, dtype=h5py.string_dtype())
            else:
                file[name] = values
        file["column"] = columns["f_li4"][:, None]
        kind = h5py.h5t.IEEE_F32LE.copy()
        kind.set_fields(15, 7, 8, 0, 7)
        kind.set_size(2)
        kind.set_ebias(127)
        array = h5py.h5d.create(file.id, b"brain", kind, h5py.h5s.create_simple((ROWS,)))
        array.write(h5py.h5s.ALL, h5py.h5s.ALL, np.linspace(-3, 3, ROWS, dtype="f4"))
    started = Services.start(Settings(data_dir=folder, cache_dir=folder / "cache"))
    started.catalog.dataset_within(60, "columns")
    yield started
    started.close()


def _kept(services: Services, *where: str) -> list[int]:
    dataset = services.catalog.dataset("columns")
    rows = services.batcher.splitter.rows(dataset, "all", FilteredSpec(where=where))
    return list(range(ROWS)) if rows is None else np.asarray(rows[:]).tolist()


def _compare(values: Column, sign: str, bound: Any) -> npt.NDArray[np.bool_]:
    """What numpy says; of integers Python, which compares numbers of any size and kind exactly."""
    if values.dtype.kind in "OS":
        texts = [text.decode() if isinstance(text, bytes) else text for text in values.tolist()]
        return np.array([_SIGNS[sign](text, bound) for text in texts])
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            try:
                bound = values.dtype.type(bound)
            except OverflowError:
                bound = values.dtype.type(math.inf if bound > 0 else -math.inf)
        return np.asarray(_SIGNS[sign](values, bound))
    return np.array([_SIGNS[sign](value, bound) for value in values.tolist()])


def _numbers(values: Column) -> st.SearchStrategy[Any]:
    """Numbers that are there, beside those that are, and of any size."""
    there = sorted({float(v) if values.dtype.kind == "f" else int(v) for v in values.tolist() if v == v})
    near = st.sampled_from(there).flatmap(lambda v: st.sampled_from([v, v + 1, v - 1, v + 0.5, v * 2]))
    some = st.one_of(near, st.integers(-(10**25), 10**25), st.floats(allow_nan=False), st.just(10**400))
    return st.one_of(near, some)


def _written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


@given(data=st.data())
def test_comparisons(services: Services, columns: dict[str, Column], data: st.DataObject) -> None:
    """Of every dtype, and any value: the rows of which numpy says the same."""
    name = data.draw(st.sampled_from(sorted(columns)))
    values = columns[name]
    bounds = st.sampled_from(WORDS) | st.text("abä🙂 \"'", max_size=4)
    bound = data.draw(bounds if name in TEXTS else _numbers(values))
    sign = data.draw(st.sampled_from(sorted(_SIGNS)))
    space = data.draw(st.sampled_from(["", " ", " \t"]))
    expected = np.flatnonzero(_compare(values, sign, bound)).tolist()
    assert _kept(services, f"{name}{space}{sign}{space}{_written(bound)}") == expected


@given(data=st.data())
def test_sets_and_ranges(services: Services, columns: dict[str, Column], data: st.DataObject) -> None:
    """`in` holds where one of its items does, `not in` in all other rows."""
    name = data.draw(st.sampled_from(sorted(columns)))
    values, is_text = columns[name], name in TEXTS
    bounds = st.sampled_from(WORDS) if is_text else _numbers(values)
    found = np.zeros(ROWS, np.bool_)
    items = []
    for _ in range(data.draw(st.integers(1, 8))):
        low, high = sorted([data.draw(bounds), data.draw(bounds)])
        kind = data.draw(st.sampled_from(["one", "between", "from", "to", "nan"]))
        if kind == "one" or (kind == "nan" and values.dtype.kind != "f"):
            items.append(_written(low))
            found |= _compare(values, "=", low)
        elif kind == "nan":
            items.append("nan")
            found |= values != values
        else:
            items.append(f"{'' if kind == 'to' else _written(low)} .. {'' if kind == 'from' else _written(high)}")
            above = np.ones(ROWS, np.bool_) if kind == "to" else _compare(values, ">=", low)
            below = np.ones(ROWS, np.bool_) if kind == "from" else _compare(values, "<=", high)
            found |= above & below
    listed = ", ".join(items)
    assert _kept(services, f"{name} in {listed}") == np.flatnonzero(found).tolist()
    assert _kept(services, f"{name} not in {listed}") == np.flatnonzero(~found).tolist()


@given(data=st.data())
def test_all_conditions_must_hold(services: Services, columns: dict[str, Column], data: st.DataObject) -> None:
    """Of the same field or of others."""
    where, expected = [], np.ones(ROWS, np.bool_)
    for _ in range(data.draw(st.integers(2, 5))):
        name = data.draw(st.sampled_from(["f_u1", "f_li8", "f_lf4", "any"]))
        bound = data.draw(st.sampled_from(WORDS) if name == "any" else st.integers(-2, 50))
        sign = data.draw(st.sampled_from(sorted(_SIGNS)))
        where.append(f"{name} {sign} {_written(bound)}")
        expected &= _compare(columns[name], sign, bound)
    assert _kept(services, *where) == np.flatnonzero(expected).tolist()
    dataset = services.catalog.dataset("columns")
    assert bind(dataset, where)[0].text == bind(dataset, list(reversed(where)))[0].text


def test_nan(services: Services, columns: dict[str, Column]) -> None:
    """It is equal to nan only, and satisfies nothing else but !=."""
    values = columns["f_lf4"]
    missing = np.flatnonzero(values != values).tolist()
    there = np.flatnonzero(values == values).tolist()
    assert missing and _kept(services, "f_lf4 = nan") == _kept(services, "f_lf4 in NaN") == missing
    assert _kept(services, "f_lf4 != nan") == _kept(services, "f_lf4 in ..") == there
    assert _kept(services, "f_lf4 <= inf") == _kept(services, "f_lf4 in -inf..inf") == there
    assert set(missing) <= set(_kept(services, "f_lf4 != 2"))
    assert _kept(services, "f_lf4 != nan", "f_lf4 not in ..") == []


def test_floats_are_compared_in_their_own_precision(services: Services, columns: dict[str, Column]) -> None:
    """As numpy 2 does with Python's numbers: 0.1 finds the float32 that was written as 0.1."""
    for name in ("f_lf2", "f_lf4", "f_gf4", "f_lf8"):
        found = _kept(services, f"{name} = 0.1")
        assert found == np.flatnonzero(columns[name] == 0.1).tolist() and len(found) >= 9
    assert _kept(services, "f_lf2 > 1e6") == []
    assert _kept(services, "f_lf2 < 1e6") == np.flatnonzero(columns["f_lf2"] < np.inf).tolist()


def test_integers_are_compared_exactly(services: Services, columns: dict[str, Column]) -> None:
    """Beyond 2**53, where float64 has not every integer, and beyond their own bounds."""
    values = columns["f_li8"]
    there = 2**53 + 1
    assert _kept(services, f"f_li8 = {there}") == np.flatnonzero(values == there).tolist() != []
    assert _kept(services, f"f_li8 = {2**53}") == []
    assert _kept(services, f"f_lu8 > {2**64 - 2}") == np.flatnonzero(columns["f_lu8"] == 2**64 - 1).tolist() != []
    assert _kept(services, "f_i1 < 1e400") == _kept(services, f"f_i1 < {'9' * 4000}") == list(range(ROWS))
    assert _kept(services, "f_i1 >= 300") == _kept(services, "f_i1 = 1.5") == []


def test_bfloat16(services: Services) -> None:
    """Bounds are rounded to it, to the nearest."""
    values = services.batcher.reader.read_all(services.catalog.dataset("columns").field("brain").column)
    numbers = (values.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).reshape(-1)
    assert _kept(services, "brain >= 1.5") == np.flatnonzero(numbers >= 1.5).tolist()
    third = float(numbers[10])
    # A bfloat16 has eight bits: a thousandth beside it is still the same.
    assert 10 in _kept(services, f"brain = {third * 1.001}") and 10 not in _kept(services, f"brain = {third * 1.01}")


def test_one_number_as_a_vector(services: Services, columns: dict[str, Column]) -> None:
    assert _kept(services, "column >= 4") == np.flatnonzero(columns["f_li4"] >= 4).tolist()


@given(prefix=st.sampled_from(WORDS) | st.text("abä", max_size=3))
def test_prefixes(services: Services, columns: dict[str, Column], prefix: str) -> None:
    texts = columns["any"].tolist()
    expected = [row for row, text in enumerate(texts) if text.startswith(prefix)]
    for name in TEXTS:
        assert _kept(services, f"{name} startswith {_written(prefix)}") == expected


def test_words_are_text_where_text_is(services: Services, columns: dict[str, Column]) -> None:
    """5 and "5" are one text, nan is a word, and quotes are needed only for other characters."""
    texts = columns["any"].tolist()
    for written, text in (("5", "5"), ('"5"', "5"), ("nan", "nan"), ("ä", "ä"), ('"a \\"b\\""', 'a "b"')):
        assert _kept(services, f"any = {written}") == [row for row, one in enumerate(texts) if one == text] != []


def test_many_items(services: Services, columns: dict[str, Column]) -> None:
    """As many as there may be, of numbers and of text."""
    listed = ", ".join(map(str, range(0, 2 * 700, 2)))
    for name in ("f_u1", "f_i1", "f_li8", "f_gu2", "f_lf4"):
        values = columns[name]
        expected = [row for row, value in enumerate(values.tolist()) if value in range(0, 1400, 2)]
        assert _kept(services, f"{name} in {listed}") == expected
    assert _kept(services, f"any in {listed}, ä, b") == np.flatnonzero(np.isin(columns["any"], ["ä", "b"])).tolist()


@given(texts=st.lists(st.text("aä\n", max_size=9), max_size=9), width=st.integers(1, 6))
def test_text_is_cut(texts: list[str], width: int) -> None:
    """Of text of any length, no more is compared than can matter."""
    encoded = [text.encode() for text in texts]
    offsets = np.cumsum([0, *map(len, encoded)])
    cut = cut_text(np.frombuffer(b"".join(encoded), np.uint8), offsets, width)
    assert cut.tolist() == [text[:width] for text in encoded]


@pytest.mark.parametrize(
    ("condition", "short"),
    [
        ("label   in dog,cat ,dog", "label in cat, dog"),
        ("width>=200", "width >= 200"),
        ('"width" == "a b"', 'width = "a b"'),
        ('"a field" NOT IN "cat", 1..2, ..', '"a field" not in .., 1..2, cat'),
        ('x = "5"', 'x = "5"'),
        ("x in 1. .. 2", "x in 1. ..2"),
        ('x startswith "\\u00e4"', "x startswith ä"),
    ],
)
def test_one_spelling(condition: str, short: str) -> None:
    assert str(parse(condition)) == short == str(parse(short))


@pytest.mark.parametrize(
    ("condition", "why"),
    [
        ("", "expected a field"),
        ("width", r"the condition ends after the field: add a comparison .*'width >= 200'"),
        ("label not 3", r"expected =, !=, .* not 'not'$"),
        ("my field = 3", """not 'field': put a field name with spaces in double quotes, as in "my field"$"""),
        ("label = red fox", """unexpected 'fox': put text with spaces in double quotes, as in "red fox"$"""),
        ("label in cat, red fox", """unexpected 'fox': put text with spaces in double quotes"""),
        ("title = 'cat'", r"""unexpected "'": use double quotes for text, as in "cat"$"""),
        ("label =", "expected a value, not the end"),
        ("label ~ 3", "unexpected '~'"),
        ("label = 1 and width = 2", "give 'where' once for each condition"),
        ("label = 1, 2", "use 'in' for several values"),
        ("label = 1..2", "use 'in' for several values and for ranges"),
        ("label in (1, 2)", r"unexpected '\('"),
        ("label in 1,", "expected a value"),
        ('label = "cat', "a string is not closed"),
        ('label = "\\ud800"', "is not a string of JSON"),
        ("a:b = 3", 'must be quoted: "a:b"'),
        ("x = " + "1" * MAX_CHARS, "more than the 4096"),
        ("x in " + "1," * MAX_ITEMS + "1", "more than the 1000 items"),
    ],
)
def test_what_is_not_of_the_grammar(condition: str, why: str) -> None:
    with pytest.raises(InvalidCondition, match=why) as failure:
        parse(condition)
    assert len(str(failure.value)) < 500


def test_conditions_are_bounded() -> None:
    assert len(canonical(f"x = {number}" for number in range(MAX_CONDITIONS))) == MAX_CONDITIONS
    with pytest.raises(ValueError, match="17 conditions"):
        canonical(f"x = {number}" for number in range(MAX_CONDITIONS + 1))


_PIECES = (
    *"\"\\,.=!<>()[]{}'` \t\n\0;%&|+-_/:*?~^$#@é日🙂\ud800",
    *("in", "not", "not in", "startswith", "nan", "inf", "-inf", "true", "..", "f_u1", "any", "f_lf4", "brain", "x"),
    *("0", "1", "2.5", "1e400", "9" * 30, "cat", '"a b"', '"\\u0000"', '"\\n"', "==", ">=", ", ", " = ", " in "),
)


def _strings(count: int) -> Iterator[str]:
    """Random strings, some of which come near the grammar."""
    dice = random.Random(11)
    for _ in range(count):
        start = dice.choice(
            ["", "", "f_u1 ", "any ", "f_lf4 in ", "f_u1 = ", "any not in ", "f_lf4 < ", "any startswith "]
        )
        yield start + "".join(dice.choices(_PIECES, k=dice.randrange(8)))


def _fuzz(services: Services, count: int) -> None:
    dataset = services.catalog.dataset("columns")
    good = 0
    for text in _strings(count):
        try:
            condition = parse(text)
            assert str(parse(str(condition))) == str(condition)
            (predicate,) = bind(dataset, [text])
        except (InvalidCondition, BadParameter):
            continue
        good += 1
        # Read as it is written in short, it means the same.
        (again,) = bind(dataset, [str(condition)])
        assert again.text == predicate.text and bind(dataset, [predicate.text])[0].text == predicate.text
    assert good > count // 50


def test_fuzz(services: Services) -> None:
    """Any string is a condition, or an error that says why it is none; and a condition reads as it is written."""
    _fuzz(services, 2000)


@pytest.mark.slow
def test_fuzz_more(services: Services) -> None:
    _fuzz(services, 100_000)


@pytest.fixture(scope="module")
def things(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Column]:
    """Fields of the dataset `things`."""
    dice = np.random.default_rng(3)
    count = 600
    score = dice.random(count).astype("<f4")
    score[::7] = np.nan
    return {
        "images": dice.integers(0, 256, (count, 6, 6), np.uint8),
        "label": dice.choice(3, count, p=[0.6, 0.3, 0.1]).astype(np.uint8),
        "width": dice.integers(0, 1000, count),
        "score": score,
        "patient": np.arange(count) // 6,
        "weight": np.where(np.isnan(score), np.nan, 1.0),
    }


@pytest.fixture(scope="module")
def server(
    things: dict[str, Column], tmp_path_factory: pytest.TempPathFactory, serve_module: Callable[..., ServerProcess]
) -> ServerProcess:
    folder = tmp_path_factory.mktemp("things")
    with h5py.File(folder / "things.h5", "w") as file:
        for name, values in things.items():
            file[name] = values
        file.create_dataset("lists", len(things["width"]), h5py.vlen_dtype("i4"))
        file["label"].attrs["class_names"] = ["cat", "dog", "red fox"]
        titles = [f"{'The ' * (row % 3 == 0)}title {row}" for row in range(600)]
        file.create_dataset("title", data=titles, dtype=h5py.string_dtype())
        file.create_dataset("far", data=np.arange(600) % 2, chunks=(50,), compression="gzip")
    return serve_module(folder, "--workers", "2")


@pytest.fixture(scope="module")
def http(server: ServerProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=f"{server.url}/v1/datasets/things", timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def dataset(server: ServerProcess) -> Iterator[h5feed.Dataset]:
    with h5feed.connect(server.url, deadline=60) as feed:
        yield feed["things"]


WHERE = ["label in cat, dog", "width >= 200", "score != nan"]


@pytest.fixture(scope="module")
def kept(things: dict[str, Column]) -> Column:
    """The rows that meet `WHERE`."""
    return np.flatnonzero((things["label"] <= 1) & (things["width"] >= 200) & ~np.isnan(things["score"]))


def _rows(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    rows: list[int] = np.load(io.BytesIO(answer.content))["__rows__"].tolist()
    return rows


def test_classes_have_names(dataset: h5feed.Dataset, things: dict[str, Column]) -> None:
    for where, value in (("label = cat", 0), ('label = "red fox"', 2), ("label = 1", 1), ("label > dog", 2)):
        np.testing.assert_array_equal(dataset.split_rows("all", where=where), np.flatnonzero(things["label"] == value))


def test_text(dataset: h5feed.Dataset) -> None:
    rows = dataset.split_rows("all", where='title startswith "The "')
    np.testing.assert_array_equal(rows, np.arange(0, 600, 3))


def test_pages_of_rows(http: httpx.Client, kept: Column) -> None:
    """`start` and `stop` count the rows that meet the conditions; without conditions they are row ids."""
    params: dict[str, Any] = {"where": WHERE, "fields": "width", "format": "npz"}
    assert _rows(http.get("/rows", params=params)) == kept.tolist()
    assert _rows(http.get("/rows", params=params | {"start": 10, "stop": 31, "step": 2})) == kept[10:31:2].tolist()
    assert _rows(http.get("/rows", params={"fields": "", "format": "npz", "start": 10, "stop": 12})) == [10, 11]
    answer = http.get("/rows", params=params | {"stop": len(kept) + 1})
    assert (
        answer.json()["code"] == "row_out_of_range" and f"≤ {len(kept)}, the rows that meet" in answer.json()["detail"]
    )


def test_splits_are_made_first(http: httpx.Client, dataset: h5feed.Dataset, kept: Column) -> None:
    """The rows of each split are those without a filter, less those that do not meet it; and so is the report."""
    options: dict[str, Any] = {"test": 0.2, "val": 0.1}
    report = http.get("/splits", params=options | {"where": WHERE}).json()
    assert report["where"] == sorted(WHERE)
    for split in ("train", "val", "test"):
        rows = dataset.split_rows(split, **options, where=WHERE)
        np.testing.assert_array_equal(rows, np.intersect1d(dataset.split_rows(split, **options), kept))
        assert report["splits"][split]["rows"] == len(rows)
        assert report["splits"][split]["share"] == len(rows) / len(kept)
        assert sum(entry["rows"] for entry in report["splits"][split]["classes"]) == len(rows)
        assert {entry["name"] for entry in report["splits"][split]["classes"]} == {"cat", "dog"}
    assert report["splits"]["all"]["rows"] == len(kept) and report["splits"]["all"]["max_deviation"] == 0
    plain = http.get("/splits", params=options).json()
    assert plain["where"] == [] and plain["splits"]["train"]["digest"] != report["splits"]["train"]["digest"]


@given(data=st.data())
def test_train_and_test_never_meet(dataset: h5feed.Dataset, data: st.DataObject) -> None:
    """However each of them is filtered."""
    condition = st.one_of(
        st.sampled_from(["label = cat", "label != dog", 'label in "red fox", cat', "score = nan", "score < 0.5"]),
        st.integers(0, 999).map(lambda width: f"width >= {width}"),
    )
    wheres = st.lists(condition, max_size=3)
    ways: list[dict[str, Any]] = [
        {"test": 0.3},
        {"test": 100, "val": 0.2},
        {"test": 0.2, "group": "patient"},
        {"test": 0.1, "folds": 3},
    ]
    options = data.draw(st.sampled_from(ways)) | {"split_seed": data.draw(st.integers(0, 3))}
    train = dataset.split_rows("train", **options, where=data.draw(wheres))
    test = dataset.split_rows("test", **options, where=data.draw(wheres))
    assert not np.intersect1d(train, test).size


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shuffle": True, "seed": 3, "epoch": 2},
        {"shuffle": True, "window": 64},
        {"split": "train", "test": 0.2, "shuffle": True},
        {"split": "train", "val": 0.2, "shuffle": True, "shards": 3},
    ],
)
def test_epochs(dataset: h5feed.Dataset, kept: Column, options: dict[str, Any]) -> None:
    """Each row that meets the conditions once, and no other."""
    options = dict(options)
    split, shards = options.pop("split", "all"), options.pop("shards", 1)
    rows: list[Column] = []
    weights: list[Column] = []
    for shard in range(shards):
        sharing: dict[str, Any] = {} if shards == 1 else {"shard": shard, "shards": shards}
        for batch in dataset.batches(split, batch_size=16, fields=["width"], where=WHERE, **options, **sharing):
            rows.append(batch.rows.copy())
            weights.append(np.ones(len(batch.rows)) if batch.weight is None else batch.weight.copy())
    expected = kept
    if split == "train":
        drawn = {name: value for name, value in options.items() if name in ("test", "val")}
        expected = np.intersect1d(kept, dataset.split_rows("train", **drawn))
    np.testing.assert_array_equal(np.sort(np.concatenate(rows)[np.concatenate(weights) > 0]), expected)
    plan = dataset.plan(split, batch_size=16, where=WHERE, **options)
    assert plan.rows == len(expected)


def test_limit_counts_what_is_left(dataset: h5feed.Dataset, kept: Column) -> None:
    batches = dataset.batches(batch_size=8, limit=20, where=WHERE, fields=[])
    np.testing.assert_array_equal(np.concatenate([batch.rows for batch in batches]), kept[:20])


def test_balanced_and_weighted(dataset: h5feed.Dataset, things: dict[str, Column], kept: Column) -> None:
    """Classes and weights are those of the rows that are left; rows without a weight may be filtered out."""
    batch = dataset.batch(0, batch_size=100, balance=True, shuffle=True, where=WHERE, fields=["label"])
    assert np.bincount(batch["label"]).tolist() == [50, 50] and np.isin(batch.rows, kept).all()
    drawn = dataset.batch(0, batch_size=64, weights="weight", shuffle=True, where="score != nan", fields=[])
    assert not np.isnan(things["score"][drawn.rows]).any()


def test_statistics(dataset: h5feed.Dataset, things: dict[str, Column], kept: Column) -> None:
    """Of the rows that are left, of all or of a split."""
    stats = dataset.stats(field="width", where=WHERE)
    assert stats.rows == len(kept) and stats.mean == pytest.approx(things["width"][kept].mean())
    train = dataset.split_rows("train", test=0.5, where=WHERE)
    stats = dataset.stats("train", field="width", test=0.5, where=WHERE)
    assert stats.rows == len(train) and stats.mean == pytest.approx(things["width"][train].mean())
    image = dataset.mean_image("images", where="label = dog")
    np.testing.assert_allclose(image, things["images"][things["label"] == 1].mean(axis=0), rtol=1e-5)


def test_pictures(http: httpx.Client, things: dict[str, Column]) -> None:
    """What they say is of the rows that are left."""
    said = http.get("/preview", params={"where": "label = dog", "field": "images", "format": "txt"})
    assert said.status_code == 200 and "dog" in said.text and "cat " not in said.text, said.text
    said = http.get("/stats/plot", params={"where": "label != cat", "format": "txt"})
    assert said.status_code == 200 and "dog" in said.text and "cat " not in said.text, said.text
    said = http.get(
        "/stats/plot", params={"where": "width < 10", "kind": "histogram", "field": "width", "format": "txt"}
    )
    small = things["width"][things["width"] < 10]
    assert said.status_code == 200 and f"{len(small)} rows" in said.text and f"to {small.max()}" in said.text, said.text


def test_nothing_is_left(http: httpx.Client, dataset: h5feed.Dataset) -> None:
    """No row is an answer too."""
    nothing = {"where": "width > 5000"}
    plan = http.get("/plan", params=nothing).json()
    assert (plan["rows"], plan["batches"], plan["where"]) == (0, 0, ["width > 5000"])
    assert http.get("/batches/0", params=nothing).json()["code"] == "batch_out_of_range"
    assert _rows(http.get("/rows", params=nothing | {"format": "npz"})) == []
    report = http.get("/splits", params=nothing | {"test": 0.2}).json()
    assert [split["rows"] for split in report["splits"].values()] == [0, 0, 0]
    stats = http.get("/stats", params=nothing, headers={"prefer": "wait=30"})
    assert stats.status_code == 200 and stats.json()["fields"]["width"]["rows"] == 0, stats.text
    assert list(dataset.batches(where="width > 5000")) == []


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("lable = cat", "did you mean 'label'"),
        ("label = catt", "did you mean 'cat'"),
        ("label = cow", "the classes are cat, dog, red fox"),
        ("width = wide", "'width' holds numbers (int64), but 'wide' is not a number"),
        ('width = "5"', "'width' holds numbers (int64), but '5' is in quotes, which make it text"),
        ("width = nan", "'width' holds int64, which is never NaN"),
        ("width startswith 1", "'startswith' is for text"),
        ("score < nan", "nothing is less or greater than NaN"),
        ("score in nan..1", "NaN is no bound"),
        ("width in 5..3", "5..3 is empty"),
        ("title in b..a", "b..a is empty"),
        ('title = "\\u0000"', "no character"),
        ("images > 3", "conditions need one number or text per row, but a row of 'images' has shape 6 × 6"),
        ("lists > 3", "but a row of 'lists' is a list"),
        ("width ~ 3", "unexpected '~'"),
    ],
)
def test_what_is_wrong(http: httpx.Client, condition: str, said: str) -> None:
    """Each endpoint says the same, as `bad_parameter`."""
    for path in ("plan", "batches/0", "rows", "splits", "splits/all/rows", "stats", "preview", "stats/plot"):
        answer = http.get(f"/{path}", params={"where": condition})
        assert (answer.status_code, answer.json()["code"]) == (400, "bad_parameter"), (path, answer.text)
        assert said in answer.json()["detail"], (path, answer.text)


def test_fuzz_over_http(http: httpx.Client) -> None:
    """Results or `bad_parameter`, nothing else."""
    dice = random.Random(2)
    names = ["label", "width", "score", "title", "images", "nix"]
    for text in _strings(150):
        where = f"{dice.choice(names)} {text}" if dice.random() < 0.5 else text
        answer = http.get("/rows", params={"where": where.encode("utf-8", "replace").decode(), "fields": ""})
        assert answer.status_code == 200 or answer.json()["code"] == "bad_parameter", (where, answer.text)


def test_two_spellings_share_what_is_found(
    things: dict[str, Column], serve: Callable[..., ServerProcess], tmp_path: Path
) -> None:
    """A field is read once for all spellings of a condition, for statistics too, and never again after a restart."""
    (tmp_path / "data").mkdir()
    with h5py.File(tmp_path / "data" / "d.h5", "w") as file:
        file["width"], file["label"] = things["width"], things["label"]
        file["label"].attrs["class_names"] = ["cat", "dog", "fox"]
    spellings: Sequence[Any] = (["width>=200"], ["width > 199"], ["width not in ..199"], ["width in 200.."])
    with h5feed.connect(serve(tmp_path / "data").url, deadline=60) as feed:
        found = [feed["d"].split_rows("all", where=where).tolist() for where in spellings]
        assert all(rows == np.flatnonzero(things["width"] >= 200).tolist() for rows in found)
        for where in spellings:
            feed["d"].stats(field="label", where=where)
        feed["d"].split_rows("all", where=["label=dog", "width>=200"])
        feed["d"].split_rows("all", where=["width >= 200", "label = 1"])
    cache = tmp_path / "cache0"

    def files(kind: str) -> dict[str, int]:
        return {file.name: file.stat().st_ino for file in cache.glob(f"served-*/{kind}/[0-9]*")}

    wait_until(lambda: len(files("filters")) == 2)
    assert len(files("stats")) == 1
    before = files("filters")
    again = ServerProcess(tmp_path / "data", cache)
    with h5feed.connect(again.url, deadline=60) as feed:
        assert feed["d"].split_rows("all", where="width >= 200").tolist() == found[0]
    assert again.stop() == 0
    assert files("filters") == before


def test_etags(http: httpx.Client) -> None:
    """The filter is in them; asked for again with one, there is nothing to send."""
    tags = {}
    for where in ("width >= 200", "width >= 201"):
        answer = http.get("/rows", params={"where": where, "fields": "", "format": "npz"})
        tags[where] = answer.headers["etag"]
        again = http.get(
            "/rows",
            params={"where": where, "fields": "", "format": "npz"},
            headers={"if-none-match": tags[where]},
        )
        assert again.status_code == 304
    assert len(set(tags.values())) == 2


def test_the_quick_way_to_batches(http: httpx.Client, kept: Column) -> None:
    """A query that was asked for before is answered by its text: with its filter."""
    params: dict[str, Any] = {"where": WHERE, "batch_size": 5, "fields": "", "format": "safetensors"}
    with_filter = [http.get("/batches/1", params=params).content for _ in range(3)]
    without = http.get("/batches/1", params={**params, "where": []}).content
    assert len(set(with_filter)) == 1 and with_filter[0] != without
    assert kept[5:10].astype("<i8").tobytes() in with_filter[0]


def test_what_takes_long_is_a_job(serve: Callable[..., ServerProcess], tmp_path: Path) -> None:
    """202 with a job that counts rows; then the answer. Batches wait for it."""
    rows = QUICK_BYTES // 8 + 1000
    with h5py.File(tmp_path / "long.h5", "w") as file:
        numbers = file.create_dataset("number", (rows,), "<i8", chunks=(1 << 20,))
        numbers[-5:] = 7
        file.create_dataset("x", (rows,), "u1", chunks=(1 << 20,))
    server = serve(tmp_path)
    with httpx.Client(base_url=f"{server.url}/v1/datasets/long", timeout=60) as http:
        answer = http.get("/rows", params={"where": "number = 7", "fields": "number"}, headers={"prefer": "wait=0"})
        assert answer.status_code == 202 and answer.json()["unit"] == "rows", answer.text
        job = f"{server.url}{answer.headers['location']}"
        wait_until(lambda: http.get(job).json()["status"] == "done")
        state = http.get(job).json()
        assert state["done"] == state["total"] == rows
        assert _rows(http.get(f"{server.url}{state['result']}&format=npz")) == list(range(rows - 5, rows))
        report = http.get("/splits", params={"where": "number = 7"}, headers={"prefer": "wait=60"}).json()
        assert report["splits"]["all"]["rows"] == 5
        batch = http.get("/batches/0", params={"where": "number != 7", "split": "all", "batch_size": 3, "fields": "x"})
        assert batch.status_code in (200, 503), batch.text
