from dataclasses import replace

import numpy as np
import pytest

from attribution import Calibration, Change, ForgetSet
from tests.tasks import blobs

TABLES = (
    {"forget": 0.9, "retain": 0.5, "test": 0.7},
    {"forget": 2.0, "retain": 3.0, "test": 4.0},
    {"forget": 5.0, "retain": 6.0, "test": 7.0},
)


@pytest.fixture
def calibration():
    return Calibration(0.72, 1.4, *TABLES, forget_sets=20)


@pytest.mark.parametrize("places", [[40, 3, 5, 3], list(range(48)), [47]])
def test_factors_are_those_of_the_kind_of_row(calibration, places):
    ones = np.ones((len(places), 2), dtype=np.float32)
    change = Change(ones, 10 * ones, 100 * ones)
    forget = ForgetSet.at(blobs(), [3, 20])
    found = calibration.applied(change, forget, np.array(places))
    kinds = ["forget" if p in (3, 20) else "retain" if p < 37 else "test" for p in places]
    columns = {"mean": TABLES[0], "std": TABLES[1], "noise": TABLES[2]}
    for (name, table), unit in zip(columns.items(), (1, 10, 100), strict=True):
        values = getattr(found, name)
        assert values.dtype == np.float32
        expected = [[unit * table[kind]] * 2 for kind in kinds]
        np.testing.assert_allclose(values, expected, rtol=1e-6)
    assert not found.absolute


def test_what_the_rows_have_in_common_widens_the_uncertainty(calibration):
    shared = replace(calibration, shared={"forget": 0.5, "retain": 0.0, "test": 2.0})
    ones = np.ones((3, 2), dtype=np.float32)
    change, places = Change(ones, 3 * ones, 4 * ones), np.array([3, 5, 40])
    forget = ForgetSet.at(blobs(), [3, 20])
    plain = calibration.applied(change, forget, places)
    for common in (0.0, 0.25, 1.0):
        found = shared.applied(change, forget, places, common)
        spreads = [(6, 2), (9, 0), (12, 8)]  # std x spread and noise x shared
        expected = [[np.hypot(a, common**0.5 * b)] * 2 for a, b in spreads]
        np.testing.assert_allclose(found.std, expected, rtol=1e-6)
        np.testing.assert_array_equal(found.mean, plain.mean)
        np.testing.assert_array_equal(found.noise, plain.noise)


def test_unknown_spreads_stay_unknown(calibration):
    nothing = np.full((1, 2), np.nan, dtype=np.float32)
    change = Change(np.ones((1, 2), dtype=np.float32), nothing, nothing)
    found = calibration.applied(change, ForgetSet.at(blobs(), [3]), np.array([3]))
    assert np.isnan(found.std).all()
    assert np.isfinite(found.mean).all()
