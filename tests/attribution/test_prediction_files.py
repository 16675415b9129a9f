import csv

import numpy as np
import pytest

from attribution import ForgetSet, Prediction
from attribution.prediction_files import COLUMNS, check_prediction_file, write_prediction
from stores import Store
from tests.tasks import blobs


@pytest.fixture
def prediction():
    random = np.random.default_rng(0)
    values = {name: random.normal(size=(3, 2)).astype(np.float32) for name in COLUMNS}
    return Prediction(("train-4", "test-0", "train-1"), **values)


@pytest.fixture
def forget():
    return ForgetSet.at(blobs(), [3, 4], "pair")


def test_zarr_holds_every_number(tmp_path, prediction, forget):
    write_prediction(prediction, str(tmp_path / "p.zarr"), forget)
    store = Store.open(tmp_path / "p.zarr", "prediction")
    assert store.ids("target") == list(prediction.targets)
    assert store.provenance.settings == {"forget": "pair", "rows": 2}
    for name in COLUMNS:
        np.testing.assert_array_equal(store.numpy(name), getattr(prediction, name))


def test_csv_holds_every_number(tmp_path, prediction, forget):
    write_prediction(prediction, str(tmp_path / "p.csv"), forget)
    with (tmp_path / "p.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["target"] for row in rows] == [t for t in prediction.targets for _ in range(2)]
    assert [row["output"] for row in rows] == ["0", "1"] * 3
    for name in COLUMNS:
        found = np.array([row[name] for row in rows], dtype=np.float32).reshape(3, 2)
        np.testing.assert_array_equal(found, getattr(prediction, name))


def test_a_csv_file_is_replaced_as_a_whole(tmp_path, prediction, forget):
    (tmp_path / "p.csv").write_text("old\n" * 99)
    write_prediction(prediction, str(tmp_path / "p.csv"), forget)
    assert "old" not in (tmp_path / "p.csv").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["p.csv"]


def test_unusable_files_are_refused(tmp_path, prediction, forget):
    (tmp_path / "there.zarr").mkdir()
    cases = {
        "p.txt": "predictions are written to .zarr or .csv, got '.*p.txt'",
        "there.zarr": "there.zarr' exists already: name another folder",
        "none/p.csv": "cannot write '.*p.csv': ",
    }
    for name, message in cases.items():
        with pytest.raises(ValueError, match=message):
            check_prediction_file(str(tmp_path / name))
        with pytest.raises(ValueError, match=message):
            write_prediction(prediction, str(tmp_path / name), forget)
