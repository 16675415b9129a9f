"""Moments that a model's file carries in a file beside it, read only when they are asked for."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIX = ".moments.safetensors"
# A model that is one layer has the empty name, which no tensor of a file may have.
PREFIX, BELONGS = "moments of ", "belongs to"


def carried_path(path: str | os.PathLike[str]) -> Path:
    """The file beside a model's file that holds its moments.

    Args:
        path: of the model.

    Returns:
        The path.

    Example:
        >>> carried_path("models/new.safetensors").name
        'new.moments.safetensors'
    """
    # Any other ending is part of the name: "model.1" and "model.2" have moments of their own.
    return Path(os.fspath(path).removesuffix(".safetensors") + SUFFIX)


def partial_path(path: str | os.PathLike[str]) -> Path:
    """Where the moments lie while the model's own file is being replaced.

    Args:
        path: of the model.

    Returns:
        The path.

    Example:
        >>> partial_path("models/new.safetensors").name
        'new.moments.safetensors.partial'
    """
    return Path(f"{carried_path(path)}.partial")


@contextmanager
def carrying(
    path: str | os.PathLike[str], moments: Mapping[str, Tensor] | None, owner: str
) -> Iterator[None]:
    """Replaces the moments beside a model's file after the body has replaced the model itself.

    They are written before, so that the model is replaced only where both files are complete. A
    kill between the two leaves them under their partial name, where they are read as well.

    Args:
        path: of the model.
        moments: by layer name; None leaves no such file.
        owner: the model that they belong to.

    Raises:
        OSError: the folder cannot be written.
        SafetensorError: likewise.
    """
    file, partial = carried_path(path), partial_path(path)
    # Its bytes may be mapped as the very moments that are to be written.
    partial.unlink(missing_ok=True)
    try:
        if moments is not None:
            tensors = {PREFIX + name: moment.contiguous() for name, moment in moments.items()}
            save_file(tensors, partial, metadata={BELONGS: owner})
        yield
    except (OSError, SafetensorError):
        partial.unlink(missing_ok=True)
        raise
    if moments is None:
        file.unlink(missing_ok=True)
    else:
        partial.replace(file)


def settle_carried(path: str | os.PathLike[str], owner: str) -> None:
    """Gives moments that a killed save left under their partial name their own.

    Args:
        path: of the model.
        owner: the model that lies there.
    """
    if _belongs(partial_path(path), owner):
        partial_path(path).replace(carried_path(path))


def _belongs(file: Path, owner: str) -> bool:
    try:
        with safe_open(file, framework="pt") as opened:
            return bool((opened.metadata() or {}).get(BELONGS) == owner)
    except (OSError, SafetensorError):
        return False


@dataclass(frozen=True, eq=False)
class CarriedMoments(Mapping[str, Tensor]):
    """The moments in the file beside a model's file.

    Args:
        path: of the model.
        owner: the model that they belong to.
    """

    path: str
    owner: str

    def __getitem__(self, name: str) -> Tensor:
        """The moments of a layer."""
        if name not in set(self):
            raise KeyError(name)
        found: Tensor = self._read(lambda file: file.get_tensor(PREFIX + name))
        return found

    def __iter__(self) -> Iterator[str]:
        """The layers' names."""
        return iter(self._read(lambda file: [k.removeprefix(PREFIX) for k in file.keys()]))  # noqa: SIM118

    def __len__(self) -> int:
        """The number of layers."""
        return sum(1 for _ in self)

    def _read(self, get: Callable[[Any], Any]) -> Any:
        file = carried_path(self.path)
        partial = partial_path(self.path)
        try:
            with safe_open(partial if _belongs(partial, self.owner) else file, "pt") as opened:
                if (opened.metadata() or {}).get(BELONGS) != self.owner:
                    raise ValueError("they are those of other weights")
                return get(opened)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"the model carries moments in {str(file)!r} from the rows it has forgotten,"
                f" which cannot be read: {error}; put the file back beside the model, or forget"
                " all rows at once from the model before"
            ) from error
