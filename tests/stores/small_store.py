"""A small store whose blocks and objects divide nothing evenly, shared by the tests."""

import numpy as np
import pytest

from stores import ArraySpec, Provenance, Store, StoreSpec

IDS = {"train": [f"train-{row}" for row in range(10)], "target": ["é", "b", "c", "d", "e"]}
ARRAYS = {
    "weights": ArraySpec(("train", "target", None), (10, 5, 3), "float16", rows=4),
    "bias": ArraySpec(("target",), (5,), "float32"),
    "chosen": ArraySpec(("target", "train"), (5, 10), "bool", compress=True),
}
SPEC = StoreSpec("datamodel", "target", 2, ARRAYS)
MADE_BY = Provenance({"seed": 0})


def values(block, seed=0):
    generator = np.random.default_rng([seed, block])
    return {
        name: generator.normal(size=SPEC.block_shape(name, block)).astype(array.dtype)
        for name, array in ARRAYS.items()
    }


def whole(name, seed=0):
    parts = [values(block, seed)[name] for block in range(SPEC.blocks)]
    return np.concatenate(parts, SPEC.block_axis(name))


def refuse_after_a_look_amid_discard(store, block, monkeypatch):
    """Whoever looks between the root and the mark must not trust the block afterwards."""
    kind, reader = type(store.place), Store.open(store.path)
    remove = kind.remove

    def looked_at(place, name):
        reader.refuse_pending([block])
        remove(place, name)

    monkeypatch.setattr(kind, "remove", looked_at)
    store.discard(block)
    with pytest.raises(ValueError, match=f"block {block} of .* is pending"):
        reader.refuse_pending([block])
