import numpy as np
import pytest

from stores import Store
from tests.stores.small_store import IDS, MADE_BY, SPEC, values


@pytest.fixture
def store(tmp_path):
    return Store.create(
        tmp_path / "a" / "s", SPEC, MADE_BY, {"scale": np.ones((2, 3))}, IDS, {"note": "x"}
    )


@pytest.fixture
def full(store):
    for block in (2, 0, 1):
        store.write_block(block, values(block))
    return store
