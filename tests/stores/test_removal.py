from dataclasses import replace

import numpy as np
import pytest

from stores import (
    ArraySpec,
    Provenance,
    Remains,
    Store,
    StoreSpec,
    column,
    gather,
    mapped,
    take_rows_out,
    taken_out,
)
from stores.folder import Folder
from stores.removal import remaining_spec
from tests.interruptions import Killed, kill_after
from tests.small_runs import contents

ROWS, TARGETS, MODELS = 13, 7, 3
FEW = np.array([0, 1, 3, 4, 5, 8, 9, 12])
SOME = np.array([1, 2, 5, 6])
SCORES = StoreSpec(
    "scores",
    "target",
    3,
    {
        "effects": ArraySpec(
            ("train", "target", "output"),
            (ROWS, TARGETS, 2),
            "float16",
            rows=4,
            scale="unit",
            sum="whole",
        ),
        "unit": ArraySpec(("target", "output"), (TARGETS, 2), "float32"),
        "whole": ArraySpec(("target", "output"), (TARGETS, 2), "float32"),
        "seen": ArraySpec(("target", "train"), (TARGETS, ROWS), "bool", rows=5, compress=True),
        "top": ArraySpec(("target", None), (TARGETS, 4), "int64"),
    },
)
OUTPUTS = StoreSpec(
    "outputs",
    "model",
    2,
    {
        "outputs": ArraySpec(("model", "target"), (MODELS, TARGETS), "float32", rows=2),
        "weights": ArraySpec(("model", None), (MODELS, 5), "float32"),
    },
)
SOLVED = StoreSpec(
    "rows", "train", 4, {"rows": ArraySpec(("train", "feature"), (ROWS, 3), "float64", rows=3)}
)


def values(spec):
    random = np.random.default_rng(0)
    found = {
        name: (4 * random.normal(size=array.shape)).astype(array.dtype)
        for name, array in spec.arrays.items()
    }
    if "whole" in found:
        found["whole"] = whole(found["effects"], found["unit"])
    return found


def whole(effects, unit):
    return (effects.astype(np.float64) * unit).sum(0).astype(np.float32)


def write(path, spec, blocks=None):
    store = Store.create(
        path,
        spec,
        Provenance({"seed": 3, "data": "old"}, {"versions": {"numpy": "0"}}),
        constants={"mask": np.arange(ROWS), "factor": np.eye(3)},
        ids={"train": [f"r{i}" for i in range(ROWS)], "target": [f"t{i}" for i in range(TARGETS)]},
        attributes={"without": ["r2", "r3"]},
    )
    everything = values(spec)
    for block in range(spec.blocks) if blocks is None else blocks:
        cut = {
            name: everything[name].take(range(*spec.span(block).indices(spec.length)), axis)
            for name, axis in ((n, spec.block_axis(n)) for n in spec.arrays)
        }
        store.write_block(block, cut)
    return store


def kept(**changes):
    plain = Remains(
        {"train": FEW, "target": SOME},
        Provenance({"seed": 3, "data": "new"}),
        constants={"mask": FEW, "factor": None},
        attributes={"without": ["r3"]},
    )
    return replace(plain, **changes)


def expected(spec, name):
    """The slow way: every axis by a list of positions."""
    found = values(spec)[name]
    for axis, label in enumerate(spec.array(name).axes):
        positions = {"train": FEW, "target": SOME}.get(label)
        found = found if positions is None else found.take(positions, axis)
    return found


@pytest.mark.parametrize("spec", [SCORES, OUTPUTS, SOLVED], ids=["scores", "outputs", "solved"])
def test_what_stays_is_what_was_there(tmp_path, spec):
    write(tmp_path / "s", spec)
    take_rows_out(tmp_path / "s", "token", lambda _: kept())
    left = Store.open(tmp_path / "s", spec.kind)
    assert left.complete
    assert left.verify() == []
    for name in spec.arrays:
        if name == "whole":
            continue
        np.testing.assert_array_equal(left.numpy(name), expected(spec, name))
        assert left.spec.array(name).dtype == spec.array(name).dtype
    assert left.ids("train") == [f"r{i}" for i in FEW]
    assert left.ids("target") == [f"t{i}" for i in SOME]
    np.testing.assert_array_equal(left.constant("mask"), FEW)
    with pytest.raises(ValueError, match="'factor'"):
        left.constant("factor")
    assert left.attributes == {"without": ["r3"]}
    assert left.provenance == Provenance({"seed": 3, "data": "new"})
    assert [path.name for path in tmp_path.iterdir()] == ["s"]


def test_a_sum_over_rows_is_that_of_the_rows_that_stay(tmp_path):
    write(tmp_path / "s", SCORES)
    take_rows_out(tmp_path / "s", "token", lambda _: kept())
    left = Store.open(tmp_path / "s")
    wanted = whole(expected(SCORES, "effects"), expected(SCORES, "unit"))
    np.testing.assert_allclose(left.numpy("whole"), wanted, rtol=1e-6)
    gone = np.setdiff1d(np.arange(ROWS), FEW)
    assert np.abs(values(SCORES)["effects"][gone]).max() > 1


def test_a_sum_stays_where_only_other_axes_are_cut(tmp_path):
    write(tmp_path / "s", SCORES)
    remains = kept(positions={"target": SOME})
    take_rows_out(tmp_path / "s", "token", lambda _: remains)
    left = Store.open(tmp_path / "s")
    np.testing.assert_array_equal(left.numpy("whole"), values(SCORES)["whole"][SOME])
    assert left.spec.array("effects").shape == (ROWS, len(SOME), 2)


def test_arrays_that_are_computed_are_asked_for_by_old_positions(tmp_path):
    write(tmp_path / "s", SCORES)
    asked = []

    def revise(targets):
        asked.append(targets.tolist())
        return {"top": np.stack([targets, targets]).T}

    remains = kept(shapes={"top": (len(SOME), 2)}, revise=revise)
    take_rows_out(tmp_path / "s", "token", lambda _: remains)
    assert asked == [[1, 2, 5], [6]]
    np.testing.assert_array_equal(Store.open(tmp_path / "s").numpy("top")[:, 0], SOME)


def test_what_would_need_a_pending_block_is_pending(tmp_path):
    write(tmp_path / "s", SCORES, blocks=[0, 1])  # targets 0 to 5
    take_rows_out(tmp_path / "s", "token", lambda _: kept())
    left = Store.open(tmp_path / "s")
    assert (left.done(), left.pending()) == ([0], [1])
    np.testing.assert_array_equal(left.numpy("seen", 0), expected(SCORES, "seen")[:3])


def test_a_lost_object_is_refused_and_nothing_is_lost_beside_it(tmp_path):
    write(tmp_path / "s", OUTPUTS)
    before = contents(tmp_path / "s")
    (tmp_path / "s/outputs/c/1/2").rename(tmp_path / "lost")
    with pytest.raises(RuntimeError, match=r"blocks \[1\] of .*s are damaged: restore them from"):
        take_rows_out(tmp_path / "s", "token", lambda _: kept())
    (tmp_path / "lost").rename(tmp_path / "s/outputs/c/1/2")
    assert contents(tmp_path / "s") == before
    take_rows_out(tmp_path / "s", "token", lambda _: kept())
    np.testing.assert_array_equal(
        Store.open(tmp_path / "s").numpy("outputs"), expected(OUTPUTS, "outputs")
    )


@pytest.mark.parametrize("block", [0, 2])
def test_a_damaged_block_is_refused_and_gets_no_mark(tmp_path, block):
    write(tmp_path / "s", SCORES)
    file = tmp_path / f"s/top/c/{block}/0"
    content = file.read_bytes()
    file.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(RuntimeError, match=rf"blocks \[{block}\] of .*s are damaged"):
        take_rows_out(tmp_path / "s", "token", lambda _: kept())
    assert Store.open(tmp_path / "s").verify() == [block]
    file.write_bytes(content)
    take_rows_out(tmp_path / "s", "token", lambda _: kept())
    np.testing.assert_array_equal(Store.open(tmp_path / "s").numpy("top"), expected(SCORES, "top"))


def test_killed_after_any_change_it_finishes_with_the_same_bytes(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        write(tmp_path / folder / "s", SCORES)
    take_rows_out(tmp_path / "a/s", "token", lambda _: kept())
    # Each call gets one change further than the one before, until one is not killed.
    for changes in range(1, 99):
        with monkeypatch.context() as patch:
            kill_after(patch, changes)
            try:
                take_rows_out(tmp_path / "b/s", "token", lambda _: kept())
                break
            except Killed:
                continue
    assert changes > 9
    assert left_in(tmp_path / "b") == left_in(tmp_path / "a")


@pytest.mark.parametrize("seed", range(3))
def test_killed_again_and_again_it_finishes_with_the_same_bytes(tmp_path, monkeypatch, seed):
    for folder in ("a", "b"):
        write(tmp_path / folder / "s", SCORES)
    take_rows_out(tmp_path / "a/s", "token", lambda _: kept())
    random, kills = np.random.default_rng(seed), 0
    for changes in (*random.integers(1, 12, 4), *random.integers(12, 30, 99)):
        with monkeypatch.context() as patch:
            kill_after(patch, int(changes))
            try:
                take_rows_out(tmp_path / "b/s", "token", lambda _: kept())
                break
            except Killed:
                kills += 1
    assert kills >= 4
    assert left_in(tmp_path / "b") == left_in(tmp_path / "a")


def left_in(folder):
    """Digests by name; what a killed creation left lies under another name and is swept later."""
    found = {name.removeprefix(str(folder)): told for name, told in contents(folder).items()}
    return {name: told for name, told in found.items() if ".tmp/" not in name}


def test_a_second_removal_is_another_one(tmp_path):
    write(tmp_path / "s", OUTPUTS)
    take_rows_out(tmp_path / "s", "one", lambda _: kept())
    take_rows_out(tmp_path / "s", "one", lambda _: pytest.fail("it is done"))
    positions = {"target": np.array([2])}
    take_rows_out(tmp_path / "s", "two", lambda _: kept(positions=positions))
    assert Store.open(tmp_path / "s").ids("target") == ["t5"]
    assert taken_out(tmp_path / "s") == "two"


READS = {
    "gather": lambda store: gather(store, "effects", np.array([2, 0])),
    "column": lambda store: column(store, "effects", 1),
    "mapped": lambda store: mapped(store, "unit", 0),
    "numpy": lambda store: store.numpy("seen", 0),
    "dask": lambda store: store.dask("effects"),
    "constant": lambda store: store.constant("mask"),
    "ids": lambda store: store.ids("train"),
    "write": lambda store: store.writing(2),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("before", [True, False])
def test_a_store_that_was_opened_before_is_refused(tmp_path, read, before):
    # As many rows stay as there were, so that nothing but the root tells.
    again = kept(
        positions={"train": np.arange(ROWS)}, constants={}, attributes={"without": ["r2", "r3"]}
    )
    store = write(tmp_path / "s", SCORES)
    if before:
        gather(store, "effects", np.array([2, 0]))
    take_rows_out(tmp_path / "s", "token", lambda _: again)
    with pytest.raises(ValueError, match=r"s was rewritten since it was opened; open it again"):
        read(store)
    read(Store.open(store.path))


def test_a_store_whose_state_changes_is_not_refused(tmp_path):
    store, rows = write(tmp_path / "s", SCORES), np.array([2, 0])
    found = gather(store, "effects", rows)
    block = {name: store.numpy(name, 1) for name in SCORES.arrays}
    other = Store.open(store.path)
    other.finalize()
    np.testing.assert_array_equal(gather(store, "effects", rows), found)
    other.discard(1)
    with pytest.raises(ValueError, match="is pending"):
        gather(store, "effects", rows)
    other.write_block(1, block)
    np.testing.assert_array_equal(gather(store, "effects", rows), found)


def test_blocks_and_objects_are_not_longer_than_what_stays():
    spec = remaining_spec(SCORES, kept(positions={"target": np.array([4]), "train": FEW[:2]}))
    assert (spec.block, spec.length, spec.blocks) == (1, 1, 1)
    assert spec.array("effects").rows == 2
    assert spec.array("seen").rows == 2
    with pytest.raises(ValueError, match="expected lengths of at least 1"):
        remaining_spec(SCORES, kept(positions={"train": np.array([], int)}))


def test_a_durable_store_reaches_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    monkeypatch.setenv("DATAMODEL_MATCHING_DURABLE", "1")
    write(tmp_path / "s", OUTPUTS)
    calls = []
    for name in ("sync", "clear"):
        change = getattr(Folder, name)
        monkeypatch.setattr(Folder, name, recorded(change, calls))
    take_rows_out(tmp_path / "s", "token", lambda _: kept())
    before = calls[: calls.index(("clear", "s", 0))]
    assert max(count for name, where, count in before if (name, where) == ("sync", "s.purged")) > 9


def recorded(change, calls):
    def call(self, names=()):
        calls.append((change.__name__, self.name, len(names)))
        return change(self, names) if names else change(self)

    return call
