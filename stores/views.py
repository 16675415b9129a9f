"""Labelled views of a store for a user's own analysis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from stores.blocks import refuse_unreadable
from stores.verification import damaged_constants

if TYPE_CHECKING:
    import xarray

    from stores.contents import Contents


def to_xarray(store: Contents, axes: Sequence[str]) -> xarray.Dataset:
    """Give a lazy xarray view of all arrays, constants and ids of a store.

    Args:
        store: The store.
        axes: The axes that have ids; these become coordinates.

    Returns:
        The dataset.

    Raises:
        ImportError: xarray is not installed.
        ValueError: A block is pending or lacks an object, a constant or ids are missing or
            damaged, or the store was rewritten since it was opened.
    """
    try:
        import xarray
    except ImportError as error:
        raise ImportError(
            "expected xarray for to_xarray; install it with "
            "pip install 'datamodel-matching[xarray]'"
        ) from error
    for name in store.spec.arrays:
        store.array(name)  # refuses a store that was rewritten
        refuse_unreadable(store.place, store.spec, name)
    if lost := damaged_constants(store):
        raise ValueError(
            f"{', '.join(lost)} of {store.path} are missing or damaged; restore them from a copy, "
            "or remove the store and run the same computation again"
        )
    dataset = xarray.open_zarr(store.place.zarr(), consolidated=False, chunks={})
    dataset = dataset.drop_vars("done").set_coords([f"{axis}_id" for axis in axes])
    dataset.attrs = store.attributes
    return cast("xarray.Dataset", dataset)
