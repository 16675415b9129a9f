"""What lies below a run's folder: stores, and what is left of some."""

import re

from stores import ROOT, Place, read_node

_MARK = re.compile(r"(.+)/done/c/\d+")  # of a block that was written, in a store of that name


def leftover(name: str) -> bool:
    """Whether a killed writer left a file of this name.

    Args:
        name: name of a file.

    Returns:
        True below a folder .tmp, and for files .partial.

    Example:
        >>> leftover("full.0123.tmp/zarr.json"), leftover("full/zarr.json")
        (True, False)
    """
    return name.endswith(".partial") or any(p.endswith(".tmp") for p in name.split("/")[:-1])


def store_places(run: Place) -> list[str]:
    """Names of the stores below a folder; what killed creations left is none.

    Args:
        run: the folder.

    Returns:
        Names below it, in order.

    Example:
        >>> from stores import place
        >>> store_places(place("nowhere"))
        []
    """
    return [name for name, kind in _roots(run.walk(), run).items() if kind == "group"]


def lone_arrays(run: Place) -> list[str]:
    """Names of the arrays that belong to no store: a creation in a bucket was killed.

    Args:
        run: the folder.

    Returns:
        Names below it, in order; none of a store that lost its zarr.json.

    Example:
        >>> from stores import place
        >>> lone_arrays(place("nowhere"))
        []
    """
    names = run.walk()
    lost = tuple(f"{name}/" for name in _lost(names))
    arrays = [name for name, kind in _roots(names, run).items() if kind == "array"]
    return [name for name in arrays if not name.startswith(lost)]


def damaged_roots(run: Place) -> list[str]:
    """Names of the stores whose zarr.json cannot be read, or is gone.

    A store is created as a whole, or with its zarr.json last, and no block is marked before. So
    marks without it are of a store that lost it, and arrays without marks of a creation that was
    killed.

    Args:
        run: the folder.

    Returns:
        Names below it, in order.

    Example:
        >>> import tempfile
        >>> from stores import place
        >>> run = place(tempfile.mkdtemp())
        >>> run.write("full/done/c/0", b"1234")
        >>> run.write("half/zarr.json", b'{"node_ty')
        >>> damaged_roots(run)
        ['full', 'half']
    """
    names = run.walk()
    broken = [name for name, kind in _roots(names, run).items() if kind == "damaged"]
    return sorted({*broken, *_lost(names)})


def _lost(names: list[str]) -> set[str]:
    known = set(names)
    marks = (_MARK.fullmatch(name) for name in names if not leftover(name))
    return {match[1] for match in marks if match and f"{match[1]}/{ROOT}" not in known}


def _roots(names: list[str], run: Place) -> dict[str, str]:
    """Outermost folders that have a zarr.json, and what it is of: group, array, or damaged."""
    ends = f"/{ROOT}"
    found = sorted(n.removesuffix(ends) for n in names if n.endswith(ends) and not leftover(n))
    roots: dict[str, str] = {}
    for name in found:
        # A store's own arrays have a zarr.json too, and stand behind it.
        if not any(name.startswith(f"{root}/") for root in roots):
            roots[name] = _kind(run / name)
    return roots


def _kind(where: Place) -> str:
    try:
        kind = str(read_node(where)["node_type"])
    except ValueError:
        return "damaged"
    return kind if kind in ("group", "array") else "damaged"
