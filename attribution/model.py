"""A trained model as a value: its state, and what it has already forgotten."""

import hashlib
import json
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from attribution.carried import CarriedMoments, carrying, partial_path, settle_carried
from attribution.forget import ForgetSet
from attribution.outputs import Array, evaluate
from attribution.task import Rows, State, Task

METADATA = "datamodel-matching"
TORCH_FILES = (".pt", ".pth", ".ckpt")


@dataclass(frozen=True)
class Model:
    """A state dict of a task's model, with the rows it has been made to forget.

    Args:
        task: what it was trained for.
        state: its state dict, on the CPU.
        forgotten: rows it no longer depends on; None for a model trained on all rows.
        provenance: how it came to be, plain values.
        moments: second moments of the retain rows' layer inputs by layer name, which a projected
            request leaves for the next one; None for a model that has seen none.
        since: of the forgotten rows, those that these moments still count; None for none.

    Example:
        >>> from examples.digits import mlp, task
        >>> model = Model(task, mlp().state_dict())
        >>> model.outputs([0, 1]).shape
        (2, 10)
    """

    task: Task
    state: State = field(repr=False)
    forgotten: ForgetSet | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)
    moments: Mapping[str, Tensor] | None = field(default=None, repr=False)
    since: ForgetSet | None = None

    def outputs(
        self, targets: Rows | list[int] | None = None, *, device: str | torch.device = "cpu"
    ) -> Array:
        """Outputs [target, output] on some targets, by position; None: on all of them."""
        inputs, _ = self.task.targets(targets)
        state = {name: tensor.to(device) for name, tensor in self.state.items()}
        return evaluate(self.task.new_model(0).to(device), state, inputs).numpy()

    def digest(self) -> str:
        """The sha256 over names and values of the state."""
        return _digest(self.state)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes state and provenance as safetensors; forgotten ids stand there as salted digests.

        Moments that the model carries go to `NAME.moments.safetensors` beside it, which the next
        projected request reads; move the two together. Where the save fails or is killed, the
        model that lay there is still whole, or the new one is.

        Args:
            path: file to write; replaced as a whole.

        Raises:
            ValueError: the folder cannot be written, or the name is that of a torch file.
        """
        if os.fspath(path).endswith(TORCH_FILES):
            raise ValueError(f"models are written as .safetensors, got {os.fspath(path)!r}")
        salt = secrets.token_hex(16)
        told = dict(self.provenance) | {"salt": salt}
        for key, rows in {"forgotten": self.forgotten, "since": self.since}.items():
            told[key] = [_salted(salt, row) for row in (rows.ids if rows else ())]
        partial = Path(f"{os.fspath(path)}.partial")
        told["carries"] = self.moments is not None
        tensors = {name: tensor.contiguous().clone() for name, tensor in self.state.items()}
        try:
            _settle(path)
            with carrying(path, self.moments, _owner(self.state, told)):
                save_file(tensors, partial, metadata={METADATA: json.dumps(told)})
                partial.replace(path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                partial.unlink()
            raise ValueError(f"cannot write {os.fspath(path)!r}: {error}") from error


def load_model(task: Task, path: str | os.PathLike[str], *, purged: int = 0) -> Model:
    """Reads a model from safetensors, or from a `.pt` file of tensors only.

    A file without our provenance is taken as trained on all rows.

    Args:
        task: what it was trained for.
        path: the file.
        purged: rows that were taken out of the task's data since, which the model may have
            forgotten before.

    Returns:
        The model; of the rows it has forgotten, those that the task still has.

    Raises:
        ValueError: the file cannot be read, does not fit the task's model (by key), holds
            non-finite weights, or has forgotten rows that the task does not know.

    Example:
        >>> import tempfile
        >>> from examples.digits import mlp, task
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     Model(task, mlp().state_dict()).save(f"{folder}/model.safetensors")
        ...     load_model(task, f"{folder}/model.safetensors").forgotten
    """
    name = os.fspath(path)
    state, told = _read(name)
    check_state(task, state, name)
    forgotten = _forgotten(task, told, name, purged)
    own = ("salt", "forgotten", "since", "carries")
    kept = {key: value for key, value in told.items() if key not in own}
    model = Model(task, state, forgotten, kept | {"file": Path(name).name})
    since = _known_again(task, told, "since")
    # Purged rows cannot be read, so moments that count them cannot be put right: those that are
    # stored have been.
    if not told.get("carries") or len(since) < len(told.get("since", ())):
        return model
    counted = ForgetSet.of(task, since, "since") if since else None
    return replace(model, moments=CarriedMoments(name, _owner(state, told)), since=counted)


def check_state(task: Task, state: Mapping[str, Tensor], where: str) -> None:
    """Refuses a state dict that does not fit the task's model.

    Args:
        task: whose model it should be.
        state: the state dict.
        where: what the error calls it.

    Raises:
        ValueError: a missing, unexpected or misshapen key, another dtype, or non-finite weights;
            names the key.

    Example:
        >>> from examples.digits import mlp, task
        >>> check_state(task, mlp().state_dict(), "a new model")
    """
    wanted = task.new_model(0).state_dict()
    for key in [*wanted, *state]:
        if key not in state:
            raise ValueError(f"{where} does not fit task {task.name!r}: key {key!r} is missing")
        if key not in wanted:
            raise ValueError(f"{where} does not fit task {task.name!r}: unexpected key {key!r}")
        if not isinstance(state[key], Tensor):
            raise ValueError(
                f"{where} does not fit task {task.name!r}: key {key!r} holds no tensor"
            )
        if state[key].shape != wanted[key].shape:
            raise ValueError(
                f"{where} does not fit task {task.name!r}: key {key!r} has shape"
                f" {tuple(state[key].shape)}, the model's is {tuple(wanted[key].shape)}"
            )
        if state[key].dtype != wanted[key].dtype:
            raise ValueError(
                f"{where} does not fit task {task.name!r}: key {key!r} has dtype"
                f" {state[key].dtype}, the model's is {wanted[key].dtype}"
            )
        if not torch.isfinite(state[key]).all():
            raise ValueError(f"{where} has non-finite weights in key {key!r}")


def _read(name: str) -> tuple[State, dict[str, Any]]:
    try:
        if name.endswith(TORCH_FILES):
            loaded = torch.load(name, map_location="cpu", weights_only=True)
            state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
            if not isinstance(state, dict):
                raise ValueError(f"it holds a {type(state).__name__}, not a state dict")
            return dict(state), {}
        with safe_open(name, framework="pt") as file:
            told = _checked_metadata(json.loads((file.metadata() or {}).get(METADATA, "{}")))
            return {key: file.get_tensor(key) for key in file.keys()}, told  # noqa: SIM118
    except (UnpicklingError, EOFError) as error:
        # torch's own text advises to unpickle it all the same.
        raise ValueError(
            f"cannot read the checkpoint {name!r}: it is damaged or holds more than tensors;"
            " save the state dict alone"
        ) from error
    except (OSError, SafetensorError, RuntimeError, ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"cannot read the checkpoint {name!r}: {error}") from error


def _checked_metadata(told: Any) -> dict[str, Any]:
    if not isinstance(told, dict):
        raise ValueError("its provenance is damaged")
    rows = [told.get(key, []) for key in ("forgotten", "since")]
    right = all(isinstance(r, list) and all(isinstance(row, str) for row in r) for r in rows)
    if not right or not isinstance(told.get("salt", None if any(rows) else ""), str):
        raise ValueError("its provenance is damaged")
    index = told.get("index", 0)
    if type(index) is not int or index < 0:
        raise ValueError(f"its provenance is damaged: {index!r} is no number of a model")
    return dict(told)


def _settle(path: str | os.PathLike[str]) -> None:
    """Finishes what a save that was killed left of the model that lies there."""
    if partial_path(path).exists():
        with suppress(ValueError):
            state, told = _read(os.fspath(path))
            settle_carried(path, _owner(state, told))


def _owner(state: State, told: Mapping[str, Any]) -> str:
    """What a model's moments belong to: its weights and, by the salt, this very save of them."""
    return _salted(told.get("salt", ""), _digest(state))


def _digest(state: State) -> str:
    found = hashlib.sha256()
    for name in sorted(state):
        found.update(name.encode())
        found.update(state[name].contiguous().numpy().tobytes())
    return found.hexdigest()


def _salted(salt: str, row: str) -> str:
    return hashlib.sha256(f"{salt}:{row}".encode()).hexdigest()


def _known_again(task: Task, told: Mapping[str, Any], key: str) -> list[str]:
    wanted = set(told.get(key, ()))
    return [row for row in task.train_ids if wanted and _salted(told["salt"], row) in wanted]


def _forgotten(task: Task, told: Mapping[str, Any], name: str, purged: int) -> ForgetSet | None:
    ids, count = _known_again(task, told, "forgotten"), len(told.get("forgotten", ()))
    if count - len(ids) > purged:
        raise ValueError(
            f"{name!r} has forgotten {count} rows, of which task {task.name!r} knows"
            f" {len(ids)}: open it with the task it was made from"
        )
    return ForgetSet.of(task, ids, "forgotten") if ids else None


def with_forgotten(model: Model, state: State, forget: ForgetSet, **told: Any) -> Model:
    """The model after forgetting more rows.

    Args:
        model: before.
        state: its new state dict.
        forget: the rows it forgot now.
        told: how, for the provenance.

    Returns:
        A new model; what was forgotten before stays forgotten, and moments that it carries stay
        those of before.

    Example:
        >>> from examples.digits import mlp, task
        >>> before = Model(task, mlp().state_dict())
        >>> forget = ForgetSet.of(task, ["train-17"])
        >>> with_forgotten(before, before.state, forget, method="none").forgotten.ids
        ('train-17',)
    """
    return replace(
        model,
        state=state,
        forgotten=forget.union(model.task, model.forgotten),
        since=forget.union(model.task, model.since) if model.moments is not None else None,
        provenance=dict(model.provenance) | told,
    )
