"""Arrays on disk: blocks written once, read lazily or row by row, computed by workers."""

from stores.advance import BlockCancelled, advance
from stores.blocks import name_blocks
from stores.jobs import BlocksFailed, pickle_by_value, run_blocks
from stores.layout import score_block
from stores.metadata import damaged_metadata, write_metadata
from stores.places import Place, Where, place, read_file, write_file
from stores.provenance import Provenance, check_provenance, digest, versions
from stores.removal import Remains, take_rows_out, taken_out
from stores.roots import ROOT, read_node
from stores.rows import column, gather, mapped, total
from stores.schema import ArraySpec, StoreSpec
from stores.sent import BlockFailed
from stores.store import Store
from stores.turns import in_turns
from stores.verification import damaged_constants
from stores.watching import refuse_changes, watch, watching
from stores.writing import BlockDone, BlockWriter

__all__ = [
    # What a store holds, and what made it
    "ArraySpec",
    "StoreSpec",
    "score_block",
    "Provenance",
    "check_provenance",
    "digest",
    "versions",
    # Where they lie
    "Place",
    "Where",
    "place",
    "read_file",
    "write_file",
    "ROOT",
    "read_node",
    "watch",
    "watching",
    "refuse_changes",
    # Arrays on disk
    "Store",
    "BlockDone",
    "BlockWriter",
    "damaged_constants",
    "damaged_metadata",
    "write_metadata",
    "name_blocks",
    "column",
    "gather",
    "mapped",
    "total",
    # Stores without some of their rows
    "Remains",
    "take_rows_out",
    "taken_out",
    # Blocks as tasks
    "run_blocks",
    "in_turns",
    "advance",
    "BlockCancelled",
    "BlockFailed",
    "BlocksFailed",
    "pickle_by_value",
]
