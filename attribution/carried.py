"""Moments that a model's file carries in a file beside it, read only when they are asked for."""

import os
from collections.abc import Callable, Iterator, Mapping
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


def save_carried(
    path: str | os.PathLike[str], moments: Mapping[str, Tensor] | None, digest: str
) -> None:
    """Writes the moments of a model beside its file; a model without moments leaves no such file.

    Args:
        path: of the model.
        moments: by layer name.
        digest: of the model's weights.

    Raises:
        OSError: the folder cannot be written.
        SafetensorError: likewise.
    """
    file = carried_path(path)
    if moments is None:
        file.unlink(missing_ok=True)
        return
    partial = Path(f"{file}.partial")
    tensors = {PREFIX + name: moment.contiguous() for name, moment in moments.items()}
    save_file(tensors, partial, metadata={BELONGS: digest})
    partial.replace(file)


@dataclass(frozen=True, eq=False)
class CarriedMoments(Mapping[str, Tensor]):
    """The moments in the file beside a model's file.

    Args:
        path: of the file with the moments.
        digest: of the model's weights.
    """

    path: Path
    digest: str

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
        try:
            with safe_open(self.path, framework="pt") as file:
                if (file.metadata() or {}).get(BELONGS) != self.digest:
                    raise ValueError("they are those of other weights")
                return get(file)
        except (OSError, SafetensorError, ValueError) as error:
            raise ValueError(
                f"the model carries moments in {str(self.path)!r} from the rows it has forgotten,"
                f" which cannot be read: {error}; put the file back beside the model, or forget"
                " all rows at once from the model before"
            ) from error
