"""Arrays on disk: blocks written once, read lazily or row by row, computed by workers."""

from stores.advance import BlockCancelled, advance
from stores.jobs import BlocksFailed, pickle_by_value, run_blocks
from stores.provenance import Provenance, check_provenance, digest, versions
from stores.rows import gather, mapped, total
from stores.schema import ArraySpec, StoreSpec
from stores.store import BlockDone, Store
from stores.turns import in_turns

__all__ = [
    # What a store holds, and what made it
    "ArraySpec",
    "StoreSpec",
    "Provenance",
    "check_provenance",
    "digest",
    "versions",
    # Arrays on disk
    "Store",
    "BlockDone",
    "gather",
    "mapped",
    "total",
    # Blocks as tasks
    "run_blocks",
    "in_turns",
    "advance",
    "BlockCancelled",
    "BlocksFailed",
    "pickle_by_value",
]
