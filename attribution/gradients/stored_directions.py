"""How a store of features tells of the principal directions that it was made with."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from attribution.gradients.projection import Directions
from stores import Store

PARTS = ("outputs", "inputs", "kept")


def direction_constants(directions: Mapping[str, Directions]) -> dict[str, np.ndarray[Any, Any]]:
    """The three arrays of each layer, numbered in order.

    Args:
        directions: by the first name of each layer.

    Returns:
        Constants of the store.

    Example:
        >>> one = Directions(torch.ones(1, 1, 1), torch.ones(1, 1, 1), torch.tensor([0]))
        >>> list(direction_constants({"head": one}))
        ['principal_outputs_0', 'principal_inputs_0', 'principal_kept_0']
    """
    return {
        f"principal_{part}_{number}": getattr(layer, part).numpy()
        for number, layer in enumerate(directions.values())
        for part in PARTS
    }


def stored_directions(store: Store) -> dict[str, Directions]:
    """The principal directions that a store's features were made with.

    Args:
        store: of a checkpoint's features.

    Returns:
        Directions by the first name of each layer; none where all are random.
    """
    return {
        str(name): Directions(
            *(torch.from_numpy(store.constant(f"principal_{part}_{number}")) for part in PARTS)
        )
        for number, name in enumerate(store.attributes.get("principal", []))
    }
