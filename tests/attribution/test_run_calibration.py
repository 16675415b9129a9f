import json

import pytest

from attribution import Calibration
from attribution.cases import KINDS
from attribution.combined import Weights
from attribution.run_calibration import RunCalibration

FACTORS = dict.fromkeys(KINDS, 0.8)
NEWTON = Calibration(0.72, 1.4, FACTORS, FACTORS, FACTORS, 20)
WEIGHTS = {kind: Weights(0.7, 0.2, 1.5, 2.0, growth=0.01, most=61.5, shared=0.2) for kind in KINDS}
ERRORS = {"datamodel": 0.8, "newton": 0.4, "combined": 0.3}


@pytest.mark.parametrize("weights", [WEIGHTS, {}], ids=["weighed", "newton alone"])
def test_it_is_read_as_it_was_written(tmp_path, weights):
    told = RunCalibration(NEWTON, weights, ERRORS, weights)
    told.save(tmp_path / "a.json")
    assert RunCalibration.load(tmp_path / "a.json") == told
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_weights_of_before_do_not_grow(tmp_path):
    file = tmp_path / "a.json"
    RunCalibration(NEWTON, WEIGHTS, ERRORS).save(file)
    told = json.loads(file.read_text())
    for weights in told["weights"].values():
        del weights["growth"], weights["most"], weights["shared"]
    file.write_text(json.dumps(told))
    found = RunCalibration.load(file).weights
    assert found == dict.fromkeys(KINDS, Weights(0.7, 0.2, 1.5, 2.0))
    assert found["test"].factors(50.0) == (0.7, 0.2, 1.5, 1.5, 2.0, 0.0)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (None, "No such file"),
        ("", "Expecting value"),
        ("[]", "list indices"),
        ({"schema": 2}, "its schema is 2, this version reads 3"),
        ({"newton": {"damping": 1}}, "missing"),
        ({"weights": {"forget": {"third": 1}}}, "third"),
        ({"weights": None}, "items"),
    ],
)
def test_what_is_no_calibration_is_refused_with_the_cure(tmp_path, change, text):
    file = tmp_path / "a.json"
    if isinstance(change, dict):
        RunCalibration(NEWTON, WEIGHTS, ERRORS).save(file)
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    elif change is not None:
        file.write_text(change)
    message = f"cannot read the calibration '{file}': .*{text}.*; remove it, and dmm precompute"
    with pytest.raises(ValueError, match=message):
        RunCalibration.load(file)
