"""The stores of a training's checkpoints, created with the principal directions they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from attribution.gradients.feature_store import KIND, create_store
from attribution.gradients.principal import principal_directions
from attribution.gradients.projection import Directions, Projection
from attribution.gradients.stored_directions import stored_directions
from attribution.model import Model
from attribution.task import Task
from stores import Place, Store, place


@dataclass(frozen=True)
class TrainingStores:
    """Creates the stores of a training's checkpoints, given its number.

    Args:
        task: the task.
        checkpoints: of all trainings, one training after the other.
        to: folder that the stores lie in.
        projection: settings.
        times: of the segments of a training; (): it has one checkpoint, its end.
        device: where directions and features are computed.
        directions: of each training, where they are known; None: they are found.
        layout: what else `create_store` takes.
    """

    task: Task
    checkpoints: Sequence[Model] = field(repr=False)
    to: str
    projection: Projection
    times: Sequence[float]
    device: str
    directions: Sequence[Mapping[str, Directions]] | None
    layout: Mapping[str, Any]

    def __call__(self, training: int) -> None:
        """Creates them."""
        self.stores(training)

    def __len__(self) -> int:
        return len(self.checkpoints) // self._segments

    def there(self, training: int) -> bool:
        """Whether all of them have been created."""
        return all(self._path(number).taken() for number in self._numbers(training))

    def stores(self, training: int) -> list[Store]:
        """Opens the stores of a training's checkpoints, and creates those that are not there.

        Args:
            training: its number.

        Returns:
            The stores.

        Raises:
            ValueError: one exists and was made from other data, another checkpoint or projection.
        """
        directions = self._directions(training)
        return [
            create_store(
                self._path(number),
                self.task,
                self.checkpoints[number],
                number,
                self.projection,
                times=self.times,
                device=self.device,
                directions=directions,
                **self.layout,
            )
            for number in self._numbers(training)
        ]

    def _directions(self, training: int) -> Mapping[str, Directions] | None:
        if not self.projection.principal:
            return None
        if self.directions is not None:
            return self.directions[training]
        stored = self._stored(training)
        return self._found(training) if stored is None else stored

    def _stored(self, training: int) -> Mapping[str, Directions] | None:
        """Those of a checkpoint that is there: another machine gives other last digits."""
        taken = (path for path in map(self._path, self._numbers(training)) if path.taken())
        return next((stored_directions(Store.open(path, KIND)) for path in taken), None)

    def _found(self, training: int) -> Mapping[str, Directions]:
        numbers = self._numbers(training)
        models = self.checkpoints[numbers.start : numbers.stop]
        try:
            found = principal_directions(self.task, models, self.projection, training, self.device)
        except ValueError as error:
            raise ValueError(f"checkpoint {' or '.join(map(str, numbers))}: {error}") from error
        # Another command may have been first meanwhile.
        stored = self._stored(training)
        return found if stored is None else stored

    @property
    def _segments(self) -> int:
        return len(self.times) or 1

    def _numbers(self, training: int) -> range:
        return range(self._segments * training, self._segments * (training + 1))

    def _path(self, number: int) -> Place:
        return place(self.to) / f"checkpoint-{number}"
