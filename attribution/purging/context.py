"""What every step of a purge knows: the rows, before and after, and how digests change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from attribution.folders import store_places
from attribution.forget import ForgetSet
from attribution.purging.tombstones import Tombstones
from attribution.task import Rows, Task
from stores import Place, Provenance, Store


@dataclass(frozen=True)
class Context:
    """A purge in progress.

    Args:
        run: the run's folder.
        task: the task with the rows.
        gone: the rows.
        stones: their tombstones.
        digests: old digest to new one, of data, masks and lists of ids.
    """

    run: Place
    task: Task
    gone: ForgetSet
    stones: Tombstones
    digests: Mapping[str, str]

    @cached_property
    def kept(self) -> dict[str, Rows]:
        """Positions that stay among the training rows and among the targets."""
        tests = np.arange(self.gone.total, len(self.task.target_ids))
        return {"train": self.gone.retained, "target": np.append(self.gone.retained, tests)}

    @cached_property
    def stores(self) -> dict[str, Store]:
        """The stores of the run by their names below its folder, as they are found at first."""
        return {name: Store.open(self.run / name) for name in store_places(self.run)}

    def find(self, kind: str, settings: Mapping[str, Any]) -> Store | None:
        """The store of a kind that was made with some settings, if the run has it."""
        found = (s for s in self.stores.values() if s.spec.kind == kind)
        return next((s for s in found if s.provenance.settings == settings), None)

    def left(self, ids: Sequence[str]) -> Rows:
        """Positions of the ids that stay."""
        return np.setdiff1d(np.arange(len(ids)), self.stones.matching(ids))

    def ids_left(self, ids: Sequence[str]) -> list[str]:
        """The ids that stay."""
        return [ids[i] for i in self.left(ids)]

    def provenance(self, store: Store) -> Provenance:
        """What a store says it was made from, as if the rows had not been there."""
        made = store.provenance
        return Provenance(self._replaced(made.settings), made.recorded)

    def _replaced(self, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: self._replaced(item) for key, item in value.items()}
        if isinstance(value, list):
            return [self._replaced(item) for item in value]
        return self.digests.get(value, value) if isinstance(value, str) else value
