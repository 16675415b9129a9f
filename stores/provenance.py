"""What made a store: settings that must match, and recorded facts that should."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import platform
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from stores.schema import Json

_LONGEST = 80  # characters of a value in a message
_ABSENT = object()


@dataclass(frozen=True)
class Provenance:
    """The settings that made a store, and facts recorded beside them.

    Args:
        settings: Everything that decides the numbers; another value is refused on resume.
        recorded: Library versions, source digests, hardware; another value only warns.

    Raises:
        TypeError: A value cannot be written as JSON.
        ValueError: A number is not finite.

    Example:
        >>> Provenance({"recipe": {"epochs": 8}, "seed": 0}).settings["recipe"]["epochs"]
        8
    """

    settings: Mapping[str, Json]
    recorded: Mapping[str, Json] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Bring both mappings to the form in which JSON gives them back."""
        object.__setattr__(self, "settings", plain_json(self.settings, "settings"))
        object.__setattr__(self, "recorded", plain_json(self.recorded, "recorded"))


def check_provenance(stored: Provenance, wanted: Provenance, where: str) -> None:
    """Refuse to go on with a store that other settings made.

    Args:
        stored: What made the store.
        wanted: What would be made now.
        where: The store, for the message.

    Raises:
        ValueError: A setting differs; each one is named with both values.

    Example:
        >>> check_provenance(Provenance({"seed": 0}), Provenance({"seed": 1}), "runs/a")
        Traceback (most recent call last):
            ...
        ValueError: runs/a was made with other settings:
          seed: stored 0, wanted 1;
        give another folder, or the same settings
    """
    refuse_differences(stored.settings, wanted.settings, where)
    recorded = differences(stored.recorded, wanted.recorded)
    if recorded:
        warnings.warn(
            f"{where} was made under other conditions: {'; '.join(recorded)}",
            UserWarning,
            stacklevel=3,
        )


def refuse_differences(stored: Mapping[str, Json], wanted: Mapping[str, Json], where: str) -> None:
    """Raise if two nested mappings differ, naming each field.

    Args:
        stored: What the store holds.
        wanted: What is asked for now.
        where: The store, for the message.

    Raises:
        ValueError: A field differs.

    Example:
        >>> refuse_differences({"block": 8}, {"block": 8}, "runs/a")
    """
    found = differences(stored, wanted)
    if found:
        lines = "".join(f"  {field};\n" for field in found)
        raise ValueError(
            f"{where} was made with other settings:\n{lines}"
            "give another folder, or the same settings"
        )


def differences(stored: Mapping[str, Json], wanted: Mapping[str, Json]) -> list[str]:
    """Describe each field in which two nested mappings differ.

    Args:
        stored: What the store holds.
        wanted: What is asked for now.

    Returns:
        One sentence a field, under its dotted name.

    Example:
        >>> differences({"recipe": {"epochs": 8}}, {"recipe": {"epochs": 9}, "seed": 1})
        ['recipe.epochs: stored 8, wanted 9', 'seed: stored nothing, wanted 1']
    """
    before, after = dict(_flatten(stored)), dict(_flatten(wanted))
    return [
        f"{name}: stored {_show(before, name)}, wanted {_show(after, name)}"
        for name in dict.fromkeys([*before, *after])
        if before.get(name, _ABSENT) != after.get(name, _ABSENT)
    ]


def digest(*parts: bytes | np.ndarray | str) -> str:
    """Give one SHA-256 over byte strings, texts and arrays.

    Args:
        parts: What is digested, in order; kind, dtype, shape and length count too.

    Returns:
        64 hexadecimal digits.

    Raises:
        TypeError: A part is of another type, or an array holds Python objects.

    Example:
        >>> digest("ab", "c") == digest("a", "bc")
        False
    """
    total = hashlib.sha256()
    for part in parts:
        label, content = _framed(part)
        total.update(f"{label}:{memoryview(content).nbytes}:".encode())
        total.update(content)
    return total.hexdigest()


def versions(*distributions: str) -> dict[str, str]:
    """Give the installed versions of some distributions, and of Python.

    Args:
        distributions: Names as a package index knows them; missing ones are left out.

    Returns:
        Version by name.

    Example:
        >>> sorted(versions("numpy", "no-such-distribution"))
        ['numpy', 'python']
    """
    found = {"python": platform.python_version()}
    for name in distributions:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def plain_json(value: Json, name: str) -> Json:
    """Bring a value to the form in which JSON gives it back.

    Args:
        value: Mappings, lists and tuples of plain Python values.
        name: What the value is called in a message.

    Returns:
        The same with dicts and lists.

    Raises:
        TypeError: A value or a key is of a type that JSON does not have.
        ValueError: A float is not finite.

    Example:
        >>> plain_json({"shape": (1, 2)}, "settings")
        {'shape': [1, 2]}
    """
    if isinstance(value, Mapping):
        return {_key(key, name): plain_json(item, f"{name}.{key}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(item, f"{name}[{index}]") for index, item in enumerate(value)]
    return _scalar(value, name)


def _key(key: object, name: str) -> str:
    if not isinstance(key, str):
        raise TypeError(f"expected texts as keys of {name}, got {key!r}")
    return key


def _scalar(value: Json, name: str) -> Json:
    # numpy's float64 is a float, yet its repr would leak into messages and digests.
    if value is not None and type(value) not in (bool, int, float, str):
        raise TypeError(
            f"expected a plain value at {name}, got {type(value).__name__} {value!r}; "
            "convert it with int(), float(), str() or .tolist()"
        )
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"expected a finite number at {name}, got {value}; use None or a text")
    return value


def _flatten(value: Mapping[str, Json], prefix: str = "") -> Iterator[tuple[str, Json]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flatten(item, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", item


def _show(values: Mapping[str, Json], name: str) -> str:
    if name not in values:
        return "nothing"
    text = repr(values[name])
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"


def _framed(part: bytes | np.ndarray | str) -> tuple[str, bytes | memoryview]:
    if isinstance(part, bytes):
        return "bytes", part
    if isinstance(part, str):
        return "text", part.encode()
    if isinstance(part, np.ndarray) and part.dtype.kind not in "OT":
        flat = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        return f"array {part.dtype.str} {part.shape}", flat.data
    raise TypeError(f"expected bytes, texts or arrays of numbers to digest, got {type(part)}")
