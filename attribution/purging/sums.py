"""Sums over the training rows, without the purged ones: curvatures and input moments."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from attribution.ensemble import Ensemble
from attribution.gradients import Features
from attribution.gradients.curvature import rows_curvature
from attribution.moments import input_moments
from attribution.purging.context import Context
from attribution.task import Rows
from attribution.training import threads
from stores import Store

Numbers = np.ndarray[Any, Any]


@dataclass(frozen=True)
class LessCurvature:
    """H - sum_i J_i^T R_i J_i over the purged rows i.

    Args:
        context: the purge.
        store: of a curvature.
        features: store of the features that it was made from.
    """

    context: Context
    store: Store
    features: Store

    def __call__(self, kept: Rows) -> Mapping[str, Numbers]:
        """The curvature of the rows that are left."""
        del kept  # a curvature is one block
        task, rows = self.context.task, self.context.gone.rows
        features = Features(task, (self.features,))
        j, outputs = features.gather(0, rows), features.outputs(0, rows)
        temperature = float(self.store.provenance.settings["temperature"])
        with threads(1):
            gone = rows_curvature(
                task.loss, torch.from_numpy(j), torch.from_numpy(outputs), temperature
            )
        return {"curvature": self.store.numpy("curvature") - gone}


@dataclass(frozen=True)
class LessMoments:
    """C - sum_i x_i x_i^T over the purged rows i, for every layer of every model.

    Args:
        context: the purge.
        store: of input moments.
        ensemble: store of the models.
    """

    context: Context
    store: Store
    ensemble: Store

    def __call__(self, kept: Rows) -> Mapping[str, Numbers]:
        """The moments of one block of models over the rows that are left."""
        task, ensemble = self.context.task, Ensemble(self.context.task, self.ensemble)
        module, (inputs, _) = task.new_model(0), task.rows("train", self.context.gone.rows)
        names = [name for name in self.store.spec.arrays if name.startswith("moment_")]
        block = int(kept[0]) // self.store.spec.block
        found = {name: self.store.numpy(name, block) for name in names}
        with threads(1):
            for place, model in enumerate(kept):
                gone = input_moments(module, ensemble.model(int(model)).state, inputs)
                # In the order of the layers, as they are numbered.
                for number, values in enumerate(gone.values()):
                    found[f"moment_{number}"][place] -= values.numpy()
        return found
