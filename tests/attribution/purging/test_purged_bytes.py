"""No file of a purged run holds bytes or ids of the rows."""

from pathlib import Path

import numpy as np
import pytest
import zarr

from attribution.purging.tombstones import read_tombstones
from tests.attribution.purging.runs import (
    GONE,
)

WINDOW = 12  # bytes: the outputs of a row
HELD = (
    "full/outputs",
    "calibration/bank/outputs",
    "calibration/newton-3/changes/mean",
    "datamodel-mixed-24/effects",
    "features/checkpoint-0/features",
    "few.zarr/mean",
    "in-run/scores",
    "trak-3/rows-0/rows",
    "trak-3/scores/margins",
)
NAMES = {f"person-{i:03d}" for i in GONE}


def windows(values):
    content, step = np.ascontiguousarray(values).tobytes(), values.dtype.itemsize
    return {content[i : i + WINDOW] for i in range(0, len(content) - WINDOW + 1, step)}


def apart(run):
    """Bytes of the purged rows, by array, and of all other rows."""
    inputs = run.task.train_data.tensors[0].numpy()
    gone = {"inputs": set().union(*(windows(inputs[i]) for i in GONE))}
    others = windows(np.delete(inputs, GONE, 0)) | windows(np.zeros(9, np.float32))
    for store in run.stores():
        for name, array in store.spec.arrays.items():
            values = store.numpy(name)
            if values.dtype.kind != "f":
                continue  # positions and masks: small numbers, alike in any run
            for axis, label in enumerate(array.axes):
                if label in ("train", "target"):
                    rows = rows_in(store, label)
                    found = [windows(values.take(i, axis)) for i in rows]
                    gone.setdefault(f"{store.place.name}/{name}", set()).update(*found)
            for axis, label in reversed(list(enumerate(array.axes))):
                if label in ("train", "target"):
                    values = np.delete(values, rows_in(store, label), axis)
            others |= windows(values)
    return {name: found - others for name, found in gone.items()}


def rows_in(store, axis):
    """Positions of the purged rows along an axis."""
    try:
        return [i for i, row in enumerate(store.ids(axis)) if row in NAMES]
    except ValueError:
        return list(GONE)


def holding(path, hidden):
    """Files, as they are and decoded, that hold some of the hidden bytes."""
    found = {str(file): file.read_bytes() for file in path.rglob("*") if file.is_file()}
    for file in path.rglob("zarr.json"):
        array = zarr.open(file.parent, mode="r")
        if isinstance(array, zarr.Array) and file.parent.name[-3:] != "_id":
            found[f"{file.parent} decoded"] = np.asarray(array[...]).tobytes()
    return {
        name.removeprefix(f"{path}/")
        for name, content in found.items()
        if any(content[i : i + WINDOW] in hidden for i in range(len(content) - WINDOW + 1))
    }


def test_no_file_holds_a_byte_of_the_rows(whole, done):
    hidden = apart(whole)
    everything = set().union(*hidden.values())
    before = holding(Path(whole.path.url), everything)
    for name in HELD:
        assert any(file.startswith(f"{name}/c/") for file in before), name
        assert f"{name} decoded" in before
        assert hidden["/".join(name.split("/")[-2:])]
    assert hidden["inputs"]
    assert holding(done[0], everything) == set()
    (done[0] / "leak").write_bytes(
        b"x" + whole.task.train_data.tensors[0][GONE[0]].numpy().tobytes()
    )
    assert holding(done[0], everything) == {"leak"}
    (done[0] / "leak").unlink()


@pytest.mark.parametrize("row", GONE)
def test_no_file_holds_an_id_of_the_rows(whole, done, row):
    def naming(path):
        files = [f for f in path.rglob("*") if f.is_file()]
        text = f"person-{row:03d}".encode()
        return [f for f in files if text in f.read_bytes() and f.name != "other.html"]

    assert len(naming(Path(whole.path.url))) > 10
    assert naming(done[0]) == []
    assert f"person-{row:03d}" in read_tombstones(done[0])
