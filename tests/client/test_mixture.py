"""Mixtures of datasets of two servers, next to what numpy makes of the same files."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5feed
import h5py
import keras
import numpy as np
import pytest
from h5feed.errors import BadParameter, BatchOutOfRange, FieldNotFound, RevisionChanged
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.recording_model import Witness
from tests.support.server_process import ServerProcess

ROWS = {"photos": 230, "drawings": 97, "sketches": 31}
OFFSET = {"photos": 0, "drawings": 1000, "sketches": 2000}


def write(folder: Path, name: str) -> None:
    """The label of a row is its id, plus a number that tells the sources apart; the other fields follow from it."""
    rows = OFFSET[name] + np.arange(ROWS[name])
    with h5py.File(folder / f"{name}.h5", "w") as file:
        image = "img" if name == "drawings" else "images"
        file[image] = (rows[:, None, None] * 7 + np.arange(12).reshape(4, 3)).astype(np.uint16)
        file["labels"] = rows
        file["wide"] = np.zeros((len(rows), 2 if name == "photos" else 3), np.float32)
        file["words"] = [f"{row}" * (row % 4) for row in rows.tolist()]
        file["classes"] = rows % 2
        file["classes"].attrs["class_names"] = ["cat", "dog"] if name != "sketches" else ["dog", "cat"]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ServerProcess]]:
    """Two servers: `photos` and `sketches`, and `drawings`."""
    started = []
    for names in (("photos", "sketches"), ("drawings",)):
        folder = tmp_path_factory.mktemp("data")
        for name in names:
            write(folder, name)
        started.append(ServerProcess(folder, tmp_path_factory.mktemp("cache")))
    yield started
    for server in started:
        assert server.stop() == 0


@pytest.fixture(scope="module")
def data(servers: list[ServerProcess]) -> Iterator[dict[str, h5feed.Dataset]]:
    with h5feed.connect(servers[0].url, deadline=60) as one, h5feed.connect(servers[1].url, deadline=60) as other:
        yield {"photos": one["photos"], "drawings": other["drawings"], "sketches": one["sketches"]}


@pytest.fixture(scope="module")
def mixture(data: dict[str, h5feed.Dataset]) -> h5feed.Mixture:
    return mixed(data, {"photos": 0.7, "drawings": 0.3})


def mixed(data: dict[str, h5feed.Dataset], weights: Any = None, names: Any = None, **options: Any) -> h5feed.Mixture:
    chosen = {name: data[name] for name in names or weights}
    renamed = {"drawings": {"img": "images"}} if "drawings" in chosen else {}
    return h5feed.mix(chosen, weights=weights, fields=renamed, **options)


def order_of(dataset: h5feed.Dataset, epoch: int, options: dict[str, Any]) -> list[int]:
    """The rows of an epoch of a source by itself."""
    return [
        int(row)
        for batch in dataset.batches(split_of(options), epoch=epoch, fields=[], **options)
        for row in batch.rows
    ]


def split_of(options: dict[str, Any]) -> str:
    return "train" if "val" in options else "all"


class Reference:
    """A mixture as numpy makes it, one sample after the other, from the orders of its sources."""

    def __init__(self, mixture: h5feed.Mixture, batch_size: int, options: dict[str, Any]) -> None:
        plan = mixture.plan(split_of(options), batch_size=batch_size, **options)
        self.mixing, self.is_drawn = plan.mixing, plan.is_drawn
        self.sources, self.options = mixture.sources, options
        self.orders: dict[tuple[str, int], list[int]] = {}

    def epoch(self, epoch: int) -> list[tuple[int, int]]:
        """The source and the row of each sample."""
        names = list(self.sources)
        if not self.is_drawn:
            epoch = 0
        samples = []
        sources, places = self.mixing.assigned(epoch, np.arange(self.mixing.rows))
        for source, place in zip(sources.tolist(), places.tolist(), strict=True):
            number, position = divmod(place, self.mixing.sizes[source])
            key = names[source], number
            if key not in self.orders:
                self.orders[key] = order_of(self.sources[key[0]], number, self.options)
            samples.append((source, self.orders[key][position]))
        return samples


def check(batch: h5feed.Batch, expected: list[tuple[int, int]], names: list[str]) -> None:
    """Every field of every row is that of the file."""
    assert batch.source is not None
    assert list(zip(batch.source.tolist(), batch.rows.tolist(), strict=True)) == expected
    labels = np.array([OFFSET[names[source]] + row for source, row in expected])
    images = (labels[:, None, None] * 7 + np.arange(12).reshape(4, 3)).astype(np.uint16)
    for name, values in (("labels", labels), ("images", images), ("__source__", batch.source)):
        assert batch[name].dtype == values.dtype and np.array_equal(batch[name], values)
    assert batch.text("words") == [f"{row}" * (row % 4) for row in labels.tolist()]


FIELDS = ["images", "labels", "words", "__source__"]

HOW = st.sampled_from(
    [
        {"weights": {"photos": 0.7, "drawings": 0.3}},
        {"weights": {"photos": 1, "drawings": 2, "sketches": 3}},
        {"weights": {"photos": 0.7, "drawings": 0.3}, "stop": "all"},
        {"names": ["photos", "sketches"]},
        {"names": ["drawings", "sketches", "photos"], "temperature": 2.5, "stop": "all"},
        {"names": ["drawings", "sketches"], "round_robin": True},
        {"names": ["drawings", "sketches"], "round_robin": True, "stop": "all"},
        {"weights": {"photos": 0.5, "drawings": 0.5}, "epoch_rows": 140},
        {"names": ["photos", "sketches"], "weights": {0: [0.9, 0.1], 1: [0, 1]}, "epoch_rows": 75},
    ]
)
ORDER = st.fixed_dictionaries(
    {"seed": st.integers(0, 3), "limit": st.sampled_from([29, 41])},
    optional={"shuffle": st.just(True), "val": st.just(0.25)},
).flatmap(lambda order: st.sampled_from([order, {**order, "shuffle": True, "window": 16}]))


@settings(max_examples=10)
@given(how=HOW, order=ORDER, mixed_batches=st.booleans(), size=st.integers(3, 24), data_of=st.data())
def test_a_mixture_is_what_numpy_makes(
    data: dict[str, h5feed.Dataset],
    how: dict[str, Any],
    order: dict[str, Any],
    mixed_batches: bool,
    size: int,
    data_of: st.DataObject,
) -> None:
    """Whole epochs, from any batch on, and in shards."""
    mixture, epoch = mixed(data, mixed=mixed_batches, **how), data_of.draw(st.integers(0, 2))
    split = split_of(order)
    if not mixed_batches and how.get("stop", "first") == "first":
        shortest = min(mixture.sources[name].plan(split, **order).rows for name in mixture.sources)
        size = min(size, how.get("epoch_rows", shortest))
    plan = mixture.plan(split, batch_size=size, **order)
    reference = Reference(mixture, size, order)
    expected = reference.epoch(epoch)
    assert plan.rows == len(expected)
    names = list(mixture.sources)
    got = list(mixture.batches(split, batch_size=size, epoch=epoch, fields=FIELDS, **order))
    for batch in got:
        part = expected[batch.index * size : (batch.index + 1) * size]
        check(batch, part, names)
        assert mixed_batches or len({source for source, _ in part}) == 1
        assert batch.epoch == epoch
    assert sum(len(batch.rows) for batch in got) == len(expected)
    index = data_of.draw(st.integers(0, plan.batches - 1))
    check(
        mixture.batch(index, split=split, batch_size=size, epoch=epoch, fields=FIELDS, **order),
        expected[index * size :][:size],
        names,
    )
    shards = data_of.draw(st.integers(2, 3))
    for shard in range(shards):
        of_shard: Any = {"shard": shard, "shards": shards, "last": data_of.draw(st.sampled_from(["pad", "drop"]))}
        for batch in mixture.batches(split, batch_size=size, epoch=epoch, fields=FIELDS, **order, **of_shard):
            begin = (batch.index * shards + shard) * size
            places = [place % len(expected) for place in range(begin, begin + size)]
            check(batch, [expected[place] for place in places], names)
            if batch.weight is not None:
                assert batch.weight.tolist() == [float(place < len(expected)) for place in range(begin, begin + size)]


@pytest.mark.parametrize("mixed_batches", [True, False])
def test_shards_are_disjoint_and_complete(data: dict[str, h5feed.Dataset], mixed_batches: bool) -> None:
    """Each row of each source once, in the batches of all shards together."""
    mixture = mixed(data, names=["photos", "drawings", "sketches"], mixed=mixed_batches, stop="all")
    rows = []
    for shard in range(3):
        for batch in mixture.batches(batch_size=8, shuffle=True, shard=shard, shards=3):
            assert batch.source is not None and batch.weight is not None
            rows += [
                pair
                for pair, weight in zip(zip(batch.source, batch.rows, strict=True), batch.weight, strict=True)
                if weight
            ]
    assert {*rows} == {(number, row) for number, name in enumerate(mixture.sources) for row in range(ROWS[name])}
    assert len(rows) == len({*rows}) or not mixed_batches


def loops(mixture: h5feed.Mixture, **options: Any) -> Any:
    return mixture.loader(batch_size=16, shuffle=True, seed=4, x="images", y="labels", **options)


def labels_of(batches: Any) -> list[list[int]]:
    return [y.tolist() for _, y, *_ in batches]


@pytest.mark.parametrize("how", [{}, {"epoch_rows": 100}, {"mixed": False}])
def test_passes_and_resuming(data: dict[str, h5feed.Dataset], how: dict[str, Any]) -> None:
    """A loader delivers epoch after epoch; from the state after any batch, the rest and the epochs that follow."""
    mixture = mixed(data, {"photos": 0.7, "drawings": 0.3}, **how)
    with loops(mixture) as train:
        epochs = [labels_of(train) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for epoch, batches in enumerate(epochs):
        asked = mixture.batches(batch_size=16, shuffle=True, seed=4, epoch=epoch, fields=["labels"])
        assert [batch["labels"].tolist() for batch in asked] == batches
    for count in range(len(epochs[0])):
        with loops(mixture) as train, loops(mixture) as resumed:
            passing = iter(train)
            for _ in range(count):
                next(passing)
            resumed.load_state_dict(json.loads(json.dumps(train.state_dict())))
            assert labels_of(resumed) == epochs[0][count:]
            assert count % 7 or labels_of(resumed) == epochs[1]


def test_resuming_with_other_shards(mixture: h5feed.Mixture) -> None:
    """The rest of the order is divided anew, where a step has as many rows as before."""
    whole = labels_of(loops(mixture))
    with loops(mixture) as train:
        passing = iter(train)
        for _ in range(4):
            next(passing)
        state = train.state_dict()
    for shard in range(2):
        options: Any = {"batch_size": 8, "shuffle": True, "seed": 4, "x": "images", "y": "labels", "last": "pad"}
        half = mixture.loader(**options, shard=shard, shards=2)
        half.load_state_dict({**state, "spec": {**state["spec"], "last": "pad"}})
        for got, batch in zip(labels_of(half), whole[4:], strict=True):
            assert got[: len(batch[shard * 8 :][:8])] == batch[shard * 8 :][:8]


def test_states_of_other_mixtures(data: dict[str, h5feed.Dataset], mixture: h5feed.Mixture) -> None:
    """Other weights, other sources or other data are refused."""
    state = loops(mixture).state_dict()
    with pytest.raises(BadParameter, match="epoch_rows=323, but here epoch_rows=194"):
        loops(mixed(data, {"photos": 0.5, "drawings": 0.5})).load_state_dict(state)
    with pytest.raises(RevisionChanged):
        loops(mixed(data, {"photos": 0.7, "sketches": 0.3})).load_state_dict(state)
    table = {"epoch_rows": 100, "weights": {0: {"photos": 1, "drawings": 1}, 4: {"photos": 1, "drawings": 2}}}
    changing = mixed(data, names=["photos", "drawings"], **table)
    loops(changing).load_state_dict(loops(changing).state_dict())
    with pytest.raises(BadParameter, match="mixture="):
        loops(mixed(data, {"photos": 1, "drawings": 1}, epoch_rows=100)).load_state_dict(loops(changing).state_dict())


def fading(epoch: int) -> list[float]:
    """Weights of a curriculum."""
    return [1, max(0, 3 - epoch)]


def test_a_curriculum(data: dict[str, h5feed.Dataset]) -> None:
    """Weights that a function gives; a pickled loader goes on in the same way, and passes of a source have no gap."""
    mixture = mixed(data, names=["photos", "sketches"], weights=fading, epoch_rows=60)
    with pickle.loads(pickle.dumps(loops(mixture))) as train:
        epochs = [[label for batch in labels_of(train) for label in batch] for _ in range(5)]
    assert [sum(label >= 2000 for label in epoch) for epoch in epochs] == [45, 40, 30, 0, 0]
    photos = [label for epoch in epochs for label in epoch if label < 1000]
    assert photos == order_of(data["photos"], 0, {"shuffle": True, "seed": 4})[: len(photos)]
    sketches = [label - 2000 for epoch in epochs for label in epoch if label >= 2000]
    orders = [order_of(data["sketches"], epoch, {"shuffle": True, "seed": 4}) for epoch in range(4)]
    assert sketches == [row for order in orders for row in order][: len(sketches)]


def test_a_server_restarts(servers: list[ServerProcess], data: dict[str, h5feed.Dataset]) -> None:
    """In the middle of an epoch: each row comes once, in its place."""
    mixture = mixed(data, {"photos": 0.7, "drawings": 0.3})
    expected = [batch["labels"].tolist() for batch in mixture.batches(batch_size=4, shuffle=True, fields=["labels"])]
    reading = mixture.batches(batch_size=4, shuffle=True, fields=["labels"], readahead=1, connections=1)
    got = [next(reading)["labels"].tolist() for _ in range(10)]
    servers[1].kill()
    servers[1].start()
    got += [batch["labels"].tolist() for batch in reading]
    assert got == expected


def test_on_another_server(
    serve: Callable[..., ServerProcess], servers: list[ServerProcess], data: dict[str, h5feed.Dataset]
) -> None:
    """The same files served elsewhere give the same batches, with the states of the first."""
    other = serve(servers[0].folder)
    with h5feed.connect(other.url, deadline=60) as feed:
        there = feed.mix({"photos": 2, "sketches": 1})
        here = h5feed.mix([(data["photos"], 2), (data["sketches"], 1)])
        assert labels_of(loops(there)) == labels_of(loops(here))
        resumed = loops(there)
        resumed.load_state_dict(loops(here).state_dict())
        listed = feed.mix(["photos", "sketches"], temperature=3)
        assert list(listed.sources) == ["photos", "sketches"]
        assert there.revision == here.revision and repr(there).startswith("<Mixture of 'photos', 'sketches', 261 rows")


def test_a_local_cache(data: dict[str, h5feed.Dataset], mixture: h5feed.Mixture, tmp_path: Path) -> None:
    """One folder for all sources: the second pass takes rows from there."""
    with loops(mixture, cache=tmp_path) as train:
        whole = labels_of(train)
    assert whole == labels_of(loops(mixture))
    with loops(mixture, cache=tmp_path) as train:
        assert labels_of(train) == whole
        assert train.stats().cached > 0
    with pytest.raises(BadParameter, match="path of its folder"):
        next(iter(loops(mixture, cache=data["photos"].cache(tmp_path))))


def test_what_is_refused(data: dict[str, h5feed.Dataset], mixture: h5feed.Mixture) -> None:
    """Before the first batch, with what would be right."""
    photos, drawings, sketches = data.values()
    for sources, options, said in (
        ([], {}, "at least one source"),
        ([photos, photos], {}, "two sources 'photos': name them"),
        (["photos"], {}, "'photos' is not a source"),
        ([(photos, 1), drawings], {}, "'drawings' has no weight"),
        ([(photos, 1), (drawings, -1)], {}, "-1 of the source 'drawings' must be a number above 0"),
        ([(photos, 1)], {"weights": [1]}, "weights already"),
        ([photos, drawings], {"weights": [1]}, "there are 2 sources"),
        ([photos, drawings], {"weights": {"photos": 1, "drawing": 1}}, "did you mean 'drawings'"),
        ([photos], {"weights": [1], "temperature": 2}, "weights and temperature contradict"),
        ([photos], {"temperature": 0}, "temperature=0 must be a number above 0"),
        ([photos], {"stop": "last"}, "must be 'first' or 'all'"),
        ([photos], {"stop": "all", "epoch_rows": 3}, "contradict"),
        ([photos], {"epoch_rows": 0}, "epoch_rows=0"),
        ([photos, sketches], {"weights": fading}, "need epoch_rows="),
        ([photos, sketches], {"weights": {1: [1, 1]}, "epoch_rows": 9}, "must start with epoch 0"),
        ([photos, sketches], {"weights": {0: [0, 0]}, "epoch_rows": 9}, "at least one must be above 0"),
        ([photos], {"fields": {"photo": {}}}, "did you mean 'photos'"),
        ([photos], {"fields": {"photos": {"words": "labels"}}}, "two fields 'labels'"),
        ([photos], {"options": {"drawings": {}}}, "no source 'drawings'"),
    ):
        with pytest.raises(BadParameter) as refused:
            h5feed.mix(sources, **options)
        assert said in str(refused.value), refused.value
    with pytest.raises(FieldNotFound, match="did you mean 'img'"):
        h5feed.mix([drawings], fields={"drawings": {"imgs": "images"}})
    plain = h5feed.mix([photos, drawings, sketches])
    for fields, said in (
        (["wide"], r"it is float32\[2\] in the source 'photos', but float32\[3\] in 'drawings'"),
        (["images"], "the source 'drawings' has no such field; if it has another name there"),
        (["classes"], "class 0 is 'cat' in one source, but 'dog' in another"),
    ):
        with pytest.raises(BadParameter, match=said):
            plain.plan(fields=fields)
    with pytest.raises(BadParameter, match="no input field"):
        plain.loader(y="labels")
    with pytest.raises(FieldNotFound, match="did you mean 'labels'"):
        plain.plan(fields=["label"])
    with pytest.raises(BadParameter, match="option of mix"):
        mixture.plan(epoch_rows=10)
    with pytest.raises(BadParameter, match="not enough rows for an epoch: the source 'drawings' has 97"):
        mixed(data, {"photos": 0.7, "drawings": 0.3}, mixed=False).plan(batch_size=98)
    with pytest.raises(BadParameter, match="the source 'sketches' has no rows in 'all'"):
        mixed(data, names=["photos", "sketches"]).plan(where="labels < 100")
    with pytest.raises(BadParameter, match="give numbers for 'images'"):
        loops(mixture, mean="server")
    with pytest.raises(BatchOutOfRange):
        mixture.batch(10_000)
    with pytest.raises(BadParameter, match="has no splits of its own"):
        mixture.splits()


def test_options_of_single_sources(data: dict[str, h5feed.Dataset]) -> None:
    """They replace those of the loop, with the source's own names of fields."""
    own = {"drawings": {"where": "labels < 1010", "split": "all", "val": None}}
    mixture = mixed(data, names=["photos", "drawings"], options=own, stop="all")
    rows = [label for batch in mixture.batches("val", val=20, fields=["labels"]) for label in batch["labels"].tolist()]
    assert len(rows) == 30 and sorted(rows)[-10:] == [*range(1000, 1010)]


@pytest.mark.parametrize("mixed_batches", [True, False])
def test_keras_trains_on_two_servers(data: dict[str, h5feed.Dataset], mixed_batches: bool) -> None:
    """`fit` gets the samples of each epoch, with the source as a second target; `evaluate` those without shuffling."""
    mixture = mixed(data, {"photos": 0.7, "drawings": 0.3}, mixed=mixed_batches)
    options: Any = {"batch_size": 16, "x": "images", "y": ("labels", "__source__"), "verbose": False}
    train = mixture.sequence(shuffle=True, seed=4, **options)
    rows: list[int] = []
    inputs = keras.Input((4, 3))
    inner = Witness(rows)(keras.layers.Flatten()(inputs))
    model = keras.Model(inputs, [keras.layers.Dense(1)(inner), keras.layers.Dense(1)(inner)])
    model.compile(keras.optimizers.SGD(1e-9), ["mse", "mse"], run_eagerly=True, jit_compile=False)
    model.fit(train, epochs=2, verbose=0)
    expected = [
        7 * label
        for epoch in range(2)
        for batch in mixture.batches(batch_size=16, shuffle=True, seed=4, epoch=epoch, fields=["labels"])
        for label in batch["labels"].tolist()
    ]
    assert rows == expected
    x, (_, source) = train[0]
    assert np.array_equal(source, x[:, 0, 0] >= 7000) and train.stats().rows == len(expected)
    plain = np.concatenate([batch.rows for batch in mixture.batches(batch_size=16, seed=4)])
    assert np.array_equal(train.row_ids, plain) and len(model.predict(train, verbose=0)[0]) == len(plain)
