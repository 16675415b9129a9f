import re

import pytest

from stores.schema import OBJECT_BYTES, ArraySpec, StoreSpec, check_name, check_schema


def weights(**changes):
    fields = {"axes": ("train", "target"), "shape": (50, 7), "dtype": "float32", **changes}
    return ArraySpec(**fields)


def spec(**changes):
    fields = {"kind": "datamodel", "axis": "target", "block": 3, "arrays": {"weights": weights()}}
    return StoreSpec(**{**fields, **changes})


def test_blocks_cover_the_axis_and_the_last_is_ragged():
    layout = spec()
    assert (layout.length, layout.blocks) == (7, 3)
    assert [layout.span(block) for block in range(3)] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert layout.block_shape("weights", 2) == (50, 1)
    assert layout.chunks("weights") == (50, 3)


def test_a_block_longer_than_the_axis_is_cut_to_it():
    assert spec(block=100).chunks("weights") == (50, 7)


def test_rows_cut_the_first_axis_that_is_not_the_block_axis():
    assert spec(arrays={"weights": weights(rows=20)}).chunks("weights") == (20, 3)
    outputs = ArraySpec(("model", "target", "output"), (5, 9, 2), "float32", rows=4)
    assert StoreSpec("outputs", "model", 2, {"o": outputs}).chunks("o") == (2, 4, 2)


@pytest.mark.parametrize("length", [2**20 + 1, 3 * 2**20, 5_000_001])
def test_large_objects_are_cut_evenly_below_the_limit(length):
    layout = spec(block=4, arrays={"w": weights(shape=(length, 7))})
    rows, width = layout.chunks("w")
    assert rows * width * 4 <= OBJECT_BYTES
    cuts = -(-length // rows)
    assert rows * cuts - length < cuts


def test_round_trip_through_json():
    arrays = {
        "a": weights(rows=20, compress=True),
        "b": ArraySpec((None, "target"), (2, 7), "bool"),
    }
    layout = spec(arrays=arrays)
    assert StoreSpec.from_json(layout.to_json()) == layout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": ("train", "rows")}, "expected axes out of model, train.*got 'rows'"),
        ({"axes": ("train", "train")}, "expected each axis once.*name the second one None"),
        ({"axes": ("train",)}, r"expected one length for each of the axes.*\(50, 7\)"),
        ({"shape": (50, 0)}, "expected lengths of at least 1"),
        ({"dtype": "real"}, "expected a numpy dtype name, got 'real'"),
        ({"dtype": "<f4"}, "expected the numpy name of a bool, integer or float type, got '<f4'"),
        ({"dtype": "complex64"}, "expected the numpy name of a bool"),
    ],
)
def test_array_specs_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        weights(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": ""}, "expected a kind such as 'datamodel', got ''"),
        ({"axis": "rows"}, "expected a block axis out of"),
        ({"block": 0}, "expected at least 1 row in a block, got block=0"),
        ({"arrays": {}}, "expected at least one array"),
        ({"axis": "model"}, "expected array 'weights' to have the axis 'model'"),
        ({"arrays": {"w": weights(rows=51)}}, "expected rows of array 'w' to be 1 to 50; got 51"),
        (
            {"arrays": {"w": ArraySpec(("target",), (7,), "bool", rows=1)}},
            "expected rows of array 'w' to be None, as no axis is left",
        ),
        (
            {"arrays": {"a": weights(), "b": weights(shape=(49, 7))}},
            "expected one length of the axis 'train', got 50 in array 'a' and 49 in array 'b'",
        ),
        ({"arrays": {"done": weights()}}, "expected an identifier as the name of an array"),
    ],
)
def test_store_specs_refuse(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_unknown_arrays_and_blocks_are_refused():
    with pytest.raises(ValueError, match="expected one of the arrays weights; got 'w'"):
        spec().array("w")
    with pytest.raises(ValueError, match="expected a block from 0 to 2, got 3"):
        spec().span(3)


@pytest.mark.parametrize("value", [{}, {"kind": "a", "axis": "train", "arrays": {"w": 1}}])
def test_json_that_is_no_specification_is_refused(value):
    with pytest.raises(ValueError, match="expected a store specification, got"):
        StoreSpec.from_json(value)


@pytest.mark.parametrize("name", ["a/b", "train", "train_id", "__a", ""])
def test_names_are_refused(name):
    with pytest.raises(ValueError, match=f"the name of an array, got {re.escape(repr(name))}"):
        check_name(name)


def test_foreign_newer_and_other_kinds_are_refused():
    with pytest.raises(ValueError, match="expected a store of datamodel-matching at x"):
        check_schema({}, "x", None)
    with pytest.raises(
        ValueError, match="x has schema version 3, expected at most 2; open it with"
    ):
        check_schema({"schema": "datamodel-matching.a", "schema_version": 3}, "x", None)
    with pytest.raises(ValueError, match="expected a store of kind 'b' at x, got kind 'a'"):
        check_schema({"schema": "datamodel-matching.a", "schema_version": 1}, "x", "b")


@pytest.mark.parametrize("field", ["scale", "sum"])
def test_companions_must_fit(field):
    def spec(other):
        scores = ArraySpec(("train", "target"), (4, 3), "float16", **{field: "beside"})
        return StoreSpec("scores", "target", 2, {"scores": scores} | other)

    assert spec({"beside": ArraySpec(("target",), (3,), "float32")}).blocks == 2
    for other in ({}, {"beside": ArraySpec(("target", "train"), (3, 4), "float32")}):
        with pytest.raises(ValueError, match=r"array 'beside' with axes \('target',\) and shape"):
            spec(other)
