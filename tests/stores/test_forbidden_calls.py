"""No code of the packages writes arrays by the calls that are known to lose rows.

dask's `to_zarr` to a new array and its `store` without a lock write parts of one chunk from several
threads: with 8 threads and chunks that do not fit, 1,700 to 2,300 of 4,000 rows were wrong, without
a warning (dask issue 12583). xarray writes through them. Blocks are written by `Store.write_block`
and `Store.writing`, which own whole chunks.
"""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("stores", "attribution", "unlearning", "examples")

LOSING = {"to_zarr", "store", "store_dask", "to_hdf5", "map_to_zarr"}
OPENING = {"create_array", "open_array", "create", "open", "zeros", "empty", "full", "array"}


def losing_calls(tree):
    """Lines that call dask's or xarray's writers, by whatever name the modules have."""
    imported = {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(("dask", "xarray"))
        for name in node.names
        if name.name in LOSING
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in LOSING:
            yield node.lineno, called.attr
        if isinstance(called, ast.Name) and called.id in imported:
            yield node.lineno, called.id


def zarr_writes(tree):
    """Lines that assign to a part of what zarr opened, in files that import zarr."""
    handles = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and opens_zarr(node.value)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        for target in getattr(node, "targets", []):
            written = target.value if isinstance(target, ast.Subscript) else None
            if opens_zarr(written) or (isinstance(written, ast.Name) and written.id in handles):
                yield node.lineno, ast.unparse(target)


def opens_zarr(node):
    """Whether an expression is a call of zarr that gives an array that can be written."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False
    called = node.func
    return (
        called.attr in OPENING and isinstance(called.value, ast.Name) and called.value.id == "zarr"
    )


def sources():
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


def test_no_source_calls_them():
    found = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        for line, name in losing_calls(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, f"{found}: write blocks with Store.write_block or Store.writing"


def test_regions_of_zarr_arrays_are_written_in_the_stores_only():
    outside = [
        f"{path.relative_to(ROOT)}:{line}: {name}"
        for path in sources()
        # The benchmarks write by hand what they compare with, on one thread.
        if path.parts[len(ROOT.parts)] != "stores" and "benchmarks" not in path.parts
        for line, name in zarr_writes(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not outside, f"{outside}: write blocks with Store.write_block or Store.writing"


@pytest.mark.parametrize(
    "source",
    [
        "x.to_zarr('path')",
        "import dask.array as da\nda.to_zarr(x, 'path', chunks=(3,))",
        "import dask.array as da\nda.store(x, z, lock=False)",
        "from dask.array import store as keep\nkeep(x, z)",
        "from dask.array import to_zarr\nto_zarr(x, 'path')",
    ],
)
def test_the_check_sees_them(source):
    assert list(losing_calls(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    ["import zarr\nz = zarr.open_array('a')\nz[0:3] = 1", "import zarr\nzarr.open('a')[2] = x"],
)
def test_the_check_sees_regions(source):
    assert list(zarr_writes(ast.parse(source)))


@pytest.mark.parametrize("source", ["self.store.dask('x')", "store(3)", "values[2:3] = 1"])
def test_other_code_passes(source):
    tree = ast.parse(source)
    assert not [*losing_calls(tree), *zarr_writes(tree)]
