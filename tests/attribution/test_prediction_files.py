import csv

import numpy as np
import pytest
import xarray

from attribution import ForgetSet, Prediction
from attribution.prediction_files import (
    COLUMNS,
    check_prediction_file,
    check_writable,
    write_prediction,
)
from stores import Store
from tests.small_runs import contents
from tests.tasks import blobs

TARGETS = ("train-4", "test-0", 'odd, "name"\nin two lines', "größe")


@pytest.fixture
def forget():
    return ForgetSet.of(blobs(), ["train-4", "train-9"])


@pytest.fixture
def prediction():
    random = np.random.default_rng(0)
    return Prediction(TARGETS, *(random.normal(size=(4, 3)).astype(np.float32) for _ in COLUMNS))


def test_a_csv_file_reads_back_to_the_same_numbers(tmp_path, prediction, forget):
    path = tmp_path / "predicted.csv"
    write_prediction(prediction, str(path), forget)
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["target", "output", "before", "mean", "std", "noise"]
    assert [(row["target"], row["output"]) for row in rows] == [
        (target, str(output)) for target in TARGETS for output in range(3)
    ]
    for name in COLUMNS:
        read = np.array([row[name] for row in rows], dtype=np.float32).reshape(4, 3)
        np.testing.assert_array_equal(read, getattr(prediction, name))


def test_a_csv_file_is_replaced_as_a_whole(tmp_path, prediction, forget):
    path = tmp_path / "predicted.csv"
    path.write_text("before\n" * 1000)
    write_prediction(prediction, str(path), forget)
    assert "before\n" not in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_a_zarr_folder_reads_back_to_the_same_numbers(tmp_path, prediction, forget):
    path = tmp_path / "predicted.zarr"
    write_prediction(prediction, str(path), forget)
    store = Store.open(path, "prediction")
    assert store.complete
    assert store.verify() == []
    assert store.ids("target") == list(TARGETS)
    dataset = xarray.open_zarr(path, consolidated=False)
    for name in COLUMNS:
        np.testing.assert_array_equal(store.numpy(name), getattr(prediction, name))
        np.testing.assert_array_equal(dataset[name].values, getattr(prediction, name))


def test_predictions_in_double_precision_are_stored_in_single(tmp_path, forget):
    values = [np.full((1, 2), 1 / 3) for _ in COLUMNS]
    write_prediction(Prediction(("train-0",), *values), f"{tmp_path}/a.zarr", forget)
    assert Store.open(tmp_path / "a.zarr").numpy("mean").tolist() == [[np.float32(1 / 3)] * 2]


def test_a_zarr_folder_that_exists_is_left_alone(tmp_path, prediction, forget):
    path = tmp_path / "predicted.zarr"
    write_prediction(prediction, str(path), forget)
    before = contents(path)
    with pytest.raises(ValueError, match=f"^'{path}' exists already: name another folder$"):
        write_prediction(prediction, str(path), forget)
    assert contents(path) == before


@pytest.mark.parametrize("name", ["predicted.xlsx", "predicted", "predicted.csv.gz", "csv"])
def test_other_endings_are_refused(name):
    with pytest.raises(
        ValueError, match=rf"^predictions are written to \.zarr or \.csv, got '{name}'$"
    ):
        check_prediction_file(name)


@pytest.mark.parametrize("ending", ["csv", "zarr"])
@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("nowhere", "No such file or directory"),
        ("file", "Not a directory"),
        ("/proc", "No such file"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused(tmp_path, folder, reason, ending):
    (tmp_path / "file").touch()
    path = str(tmp_path / folder / f"predicted.{ending}")
    with pytest.raises(ValueError, match=f"^cannot write '{path}': {reason}"):
        check_prediction_file(path)


def test_a_check_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path in ("a.csv", str(tmp_path / "a.zarr"), "./a.csv"):
        check_prediction_file(path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=f"^cannot write '{tmp_path}': a folder has that name$"):
        check_writable(str(tmp_path))
