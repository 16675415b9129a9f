"""Arrays on disk: blocks written once, read lazily or row by row, computed by workers."""

from stores.jobs import BlocksFailed, pickle_by_value, run_blocks
from stores.places import Place, Where, place
from stores.provenance import Provenance, check_provenance, digest, versions
from stores.rows import gather, mapped, total
from stores.schema import ArraySpec, StoreSpec
from stores.store import BlockDone, Store

__all__ = [
    # What a store holds, and what made it
    "ArraySpec",
    "StoreSpec",
    "Provenance",
    "check_provenance",
    "digest",
    "versions",
    # Where it lies
    "Place",
    "Where",
    "place",
    # Arrays on disk
    "Store",
    "BlockDone",
    "gather",
    "mapped",
    "total",
    # Blocks as tasks
    "run_blocks",
    "BlocksFailed",
    "pickle_by_value",
]
