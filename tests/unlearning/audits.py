"""What an evaluation of the small run must say of the splits of a forget set."""

import numpy as np
import pytest

from tests.small_runs import TEST_ROWS, TRAIN_ROWS


def places(forget):
    """Positions of each split, written out."""
    left = [i for i in range(TRAIN_ROWS) if i not in forget.positions]
    return {
        "forget": list(forget.positions),
        "retain": left,
        "test": list(range(TRAIN_ROWS, TRAIN_ROWS + TEST_ROWS)),
    }


def by_split(values, forget):
    return {split: pytest.approx(values[rows].mean()) for split, rows in places(forget).items()}


def klom_summary(values, forget):
    """The mean of each split, and P95 where there are 20 rows: the retain rows alone have them."""
    return {
        split: {
            "mean": pytest.approx(values[rows].mean()),
            "p95": pytest.approx(np.percentile(values[rows], 95)) if len(rows) >= 20 else None,
        }
        for split, rows in places(forget).items()
    }
