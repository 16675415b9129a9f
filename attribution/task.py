"""The task: data with ids, a model factory, and how to train; the user's one extension point."""

import hashlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attribution.losses import CrossEntropy, Loss
from attribution.seeds import derive_seed
from stores import digest

Split = Literal["train", "test"]
State = dict[str, Tensor]
Rows = np.ndarray[Any, np.dtype[np.int64]]
Rates = np.ndarray[Any, np.dtype[np.float64]]
TrainFunction = Callable[[Rows, int, torch.device], Mapping[str, Tensor]]
AugmentFunction = Callable[[Tensor, int, int, Tensor], Tensor]


OBJECTIVES = ("mean", "sum")


@dataclass(frozen=True)
class Recipe:
    """SGD with momentum and a triangular learning rate: the built-in training.

    The rate rises linearly from 0 to `peak_rate` over the first `peak_at` of the steps and
    falls linearly to 0 at the end. Weight decay is added to the gradient.

    Args:
        epochs: passes over the rows.
        batch_size: rows a step at most; the batches of an epoch differ by one row at most in size,
            no row is dropped.
        peak_rate: largest learning rate.
        momentum: of SGD, without dampening.
        weight_decay: of SGD, on all parameters.
        peak_at: share of the steps before the peak, in (0, 1).
        augment: called as augment(inputs [row, ...], seed, epoch, rows [row]) on the inputs of
            one model; must depend on its arguments alone. Padding has row -1 and no weight.
        version: your own name for `augment`; change it when augment changes.

    Raises:
        ValueError: a number is outside its range.

    Example:
        >>> Recipe(epochs=30, batch_size=32, peak_rate=0.1).steps(rows=1437)
        1350
    """

    epochs: int
    batch_size: int
    peak_rate: float
    momentum: float = 0.9
    weight_decay: float = 5e-4
    peak_at: float = 0.3
    augment: AugmentFunction | None = None
    version: str = ""

    def __post_init__(self) -> None:
        positive = {
            "epochs": self.epochs,
            "batch_size": self.batch_size,
            "peak_rate": self.peak_rate,
        }
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"recipe.{name} must be above 0, got {value}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"recipe.momentum must be from 0 to below 1, got {self.momentum}")
        if not self.weight_decay >= 0:
            raise ValueError(f"recipe.weight_decay must be 0 or above, got {self.weight_decay}")
        if not 0 < self.peak_at < 1:
            raise ValueError(f"recipe.peak_at must lie between 0 and 1, got {self.peak_at}")

    def steps(self, rows: int) -> int:
        """Number of steps on so many rows."""
        return self.epochs * -(-rows // self.batch_size)

    def rates(self, steps: int) -> Rates:
        """Learning rate of each step, [step]."""
        ends = [0, max(1, round(self.peak_at * steps)), steps]
        return np.asarray(np.interp(np.arange(steps) + 0.5, ends, [0, self.peak_rate, 0]))

    def settings(self) -> dict[str, Any]:
        """The fields, and how epochs are cut into batches, as plain values for provenance."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return values | {"augment": self.augment is not None, "batches": "even"}


def source_digest(function: Callable[..., Any] | None) -> str:
    """Digest of a function's source text, or "" where there is none to read.

    Args:
        function: any callable, or None.

    Returns:
        sha256 in hex, or "".

    Example:
        >>> source_digest(None)
        ''
    """
    try:
        return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()  # type: ignore[arg-type]
    except (TypeError, OSError):
        return ""


@dataclass(frozen=True)
class Task:
    """Data with ids, a model factory, and how to train a model on some of the rows.

    Args:
        name: what reports call it.
        train_data: map-style data; item i is (input tensor, label), equal each time it is read.
        test_data: likewise; its rows are targets only.
        model: returns a new model; seeded by torch's global generator.
        recipe: the built-in training, or None.
        train: your own training, train(indices [row], seed, device) -> state_dict, or None; if it
            calls `stores.advance()` now and then, it stops at once where a run is cancelled.
        version: your own name for `train`; stores made under another version are refused.
        loss: what was minimised; also defines the margin.
        train_ids: stable ids of the training rows; train-0, train-1, ... if none are given.
        test_ids: likewise; test-0, test-1, ... if none are given.
        embed: maps inputs [row, ...] to vectors [row, feature] for nearest-row forget sets.
        objective: what training weighs against its weight decay: the "mean" of the rows' losses, as
            loops over batches do, or their "sum". A row that stays counts for more of a mean when
            others go.

    Raises:
        ValueError: ids that repeat or do not fit the data, no rows, two ways to train, or another
            objective than these; a recipe's is the mean.
        TypeError: an id is no text.

    Example:
        >>> from torch.utils.data import TensorDataset
        >>> data = TensorDataset(torch.randn(6, 3), torch.arange(6) % 2)
        >>> toy = Task("toy", data, data, model=lambda: nn.Linear(3, 2))
        >>> toy.train_ids[:2], toy.target_ids[-1]
        (('train-0', 'train-1'), 'test-5')
    """

    name: str
    train_data: Any
    test_data: Any
    model: Callable[[], nn.Module]
    recipe: Recipe | None = None
    train: TrainFunction | None = None
    version: str = ""
    loss: Loss = CrossEntropy()
    train_ids: Sequence[str] = ()
    test_ids: Sequence[str] = ()
    embed: Callable[[Tensor], Tensor] | None = None
    objective: str = "mean"

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise ValueError(
                f"task {self.name!r}: objective must be {' or '.join(map(repr, OBJECTIVES))}, got"
                f" {self.objective!r}"
            )
        if self.recipe is not None and self.objective != "mean":
            raise ValueError(
                f"task {self.name!r} has a recipe, which minimises the mean of the losses, and the"
                f" objective {self.objective!r}: give it a train function or leave the objective"
            )
        if self.recipe is not None and self.train is not None:
            raise ValueError(f"task {self.name!r} has a recipe and a train function: give one")
        for split in ("train", "test"):
            object.__setattr__(self, f"{split}_ids", self._checked_ids(split))
        both = set(self.train_ids) & set(self.test_ids)
        if both:
            raise ValueError(f"task {self.name!r}: id {min(both)!r} is a train and a test row")
        if not self.train_ids:
            raise ValueError(f"task {self.name!r} has no training rows")

    def _checked_ids(self, split: str) -> tuple[str, ...]:
        size, given = len(self.data(split)), getattr(self, f"{split}_ids")
        ids = tuple(given) or tuple(f"{split}-{i}" for i in range(size))
        wrong = [row for row in ids if not isinstance(row, str)]
        if wrong:
            raise TypeError(f"expected texts as {split} ids, got {wrong[0]!r}; use str()")
        if len(ids) != size:
            raise ValueError(f"task {self.name!r}: {len(ids)} {split} ids for {size} rows")
        if len(set(ids)) != size:
            repeated = next(i for i in ids if ids.count(i) > 1)
            raise ValueError(f"task {self.name!r}: {split} id {repeated!r} stands twice")
        return ids

    def data(self, split: str) -> Any:
        """The map-style data of a split."""
        return self.train_data if split == "train" else self.test_data

    @property
    def target_ids(self) -> tuple[str, ...]:
        """Ids of all targets: the training rows, then the test rows."""
        return (*self.train_ids, *self.test_ids)

    @cached_property
    def positions(self) -> dict[str, int]:
        """Target position of each id: training rows first, then test rows."""
        return {row: i for i, row in enumerate(self.target_ids)}

    def rows(self, split: Split, positions: Sequence[int] | Rows) -> tuple[Tensor, Tensor]:
        """Inputs [row, ...] and labels [row] of some rows, read from the data."""
        data, wanted = self.data(split), np.asarray(positions, dtype=np.int64)
        # A subclass may change what its rows are.
        if type(data) is TensorDataset and len(data.tensors) == 2:
            inputs, labels = data.tensors
            return inputs[wanted], labels[wanted]
        items = [data[int(i)] for i in wanted]
        inputs = torch.stack([torch.as_tensor(item[0]) for item in items])
        return inputs, torch.stack([torch.as_tensor(item[1]) for item in items])

    def targets(self, positions: Sequence[int] | Rows | None = None) -> tuple[Tensor, Tensor]:
        """Inputs and labels of targets, in the order asked for; None: all of them."""
        n, total = len(self.train_ids), len(self.target_ids)
        wanted = np.arange(total) if positions is None else np.asarray(positions, dtype=np.int64)
        train, test = wanted[wanted < n], wanted[wanted >= n] - n
        parts = [self.rows("train", train)] if len(train) else []
        parts += [self.rows("test", test)] if len(test) else []
        back = np.argsort(np.argsort(wanted >= n, kind="stable"), kind="stable")
        inputs, labels = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
        return inputs[back], labels[back]

    def new_model(self, seed: int, index: int = 0) -> nn.Module:
        """A freshly initialised model that depends on (seed, index) alone."""
        with torch.random.fork_rng(devices=[]):
            # torch.manual_seed also queues a seed for each accelerator, which costs more than all
            # else here and touches the caller's state.
            torch.default_generator.manual_seed(derive_seed(seed, "weights", index))
            return self.model()

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digest of each split's ids, inputs and labels; reads all the data once."""
        return {split: self._digest(split) for split in ("train", "test")}

    def _digest(self, split: Split) -> str:
        ids = "\n".join(self.train_ids if split == "train" else self.test_ids)
        if not ids:
            return digest(ids)
        inputs, labels = self.rows(split, np.arange(len(self.data(split))))
        return digest(ids, inputs.numpy(), labels.numpy())

    def check(self) -> None:
        """Reads a few rows twice and runs a new model on them, before anything costly starts.

        Raises:
            ValueError: a row differs between two reads, the model does not take the inputs, or
                the loss cannot take a label.
        """
        n = len(self.train_ids)
        probe = sorted({0, n // 2, n - 1})
        first, second = self.rows("train", probe), self.rows("train", probe)
        for a, b, what in zip(first, second, ("inputs", "labels"), strict=True):
            if not torch.equal(a, b):
                raise ValueError(
                    f"task {self.name!r}: the {what} of row {self.train_ids[probe[0]]!r} or one of"
                    " its neighbours differ between two reads; put augmentation in the recipe"
                )
        try:
            with torch.no_grad():
                outputs = self.new_model(0).eval()(first[0])
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"task {self.name!r}: the model does not take inputs of shape"
                f" {tuple(first[0].shape)} and dtype {first[0].dtype}: {error}"
            ) from error
        if outputs.ndim != 2 or len(outputs) != len(probe):
            raise ValueError(
                f"task {self.name!r}: the model must map inputs [row, ...] to outputs"
                f" [row, output], got shape {tuple(outputs.shape)} for {len(probe)} rows"
            )
        for split in ("train", "test"):
            if len(self.data(split)):
                self._check_values(split, outputs.shape[1])

    def _check_values(self, split: Split, outputs: int) -> None:
        inputs, labels = self.rows(split, np.arange(len(self.data(split))))
        finite = torch.isfinite(inputs.reshape(len(inputs), -1)).all(1)
        if not finite.all():
            ids = self.train_ids if split == "train" else self.test_ids
            row = ids[int(torch.nonzero(~finite)[0])]
            raise ValueError(f"task {self.name!r}: the inputs of row {row!r} are not finite")
        try:
            self.loss.check_labels(labels, outputs)
        except ValueError as error:
            raise ValueError(f"task {self.name!r}: {split} {error}") from error

    def settings(self) -> dict[str, Any]:
        """What a store made from this task must agree on."""
        own = {"version": self.version, "own": self.train is not None}
        return {
            "task": self.name,
            "data": self.digests,
            "model": self._structure(),
            "loss": type(self.loss).__name__,
            "objective": self.objective,
            "recipe": self.recipe.settings() if self.recipe else own,
        }

    def _structure(self) -> str:
        """Digest of the model's layers and of the names, shapes and dtypes of its state."""
        model = self.new_model(0)
        parts = [f"{k}: {tuple(t.shape)} {t.dtype}" for k, t in model.state_dict().items()]
        return digest(str(model), *parts)

    def sources(self) -> dict[str, str]:
        """Digests of the user's functions, recorded and only warned about."""
        augment = self.recipe.augment if self.recipe else None
        functions = {"train": self.train, "model": self.model, "augment": augment}
        return {name: source_digest(function) for name, function in functions.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
