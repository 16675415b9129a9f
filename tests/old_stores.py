"""Stores as older versions wrote them."""

import json


def forget_scales(path):
    """Makes a store of ridge datamodels one that was fitted before there were scales of effects."""
    root = path / "zarr.json"
    told = json.loads(root.read_text())
    for name in ("alike", "free"):
        del told["attributes"]["provenance"]["settings"]["method"][name]
    root.write_text(json.dumps(told))
