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
OPENING |= {
    "ones",
    "create_group",
    "open_group",
    "group",
    "open_like",
    "from_array",
    "require_array",
}
SAVING = {"save", "save_array", "save_group", "copy", "copy_all", "copy_store"}
VIEWS = {"oindex", "vindex", "blocks"}
CHANGING = {"resize", "append", "set_basic_selection", "set_orthogonal_selection"}
CHANGING |= {"set_mask_selection", "set_coordinate_selection", "set_block_selection"}
MAPPING = {"map_blocks", "map_overlap"}


def losing_calls(tree):
    """Lines that call dask's or xarray's writers, by whatever name the modules have."""
    imported = imported_from(tree, ("dask", "xarray"), LOSING)
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = node.func
        if isinstance(called, ast.Attribute) and called.attr in LOSING:
            yield node.lineno, called.attr
        if isinstance(called, ast.Name) and called.id in imported:
            yield node.lineno, called.id


def imported_from(tree, modules, names):
    """What some names of modules are called in a file."""
    return {
        name.asname or name.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(modules)
        for name in node.names
        if name.name in names
    }


class ZarrWrites:
    """Lines of a file that write to what zarr opened there."""

    def __init__(self, tree):
        self.nodes = list(ast.walk(tree))
        imports = [name for n in self.nodes if isinstance(n, ast.Import) for name in n.names]
        self.modules = {name.asname or name.name for name in imports if name.name == "zarr"}
        self.opening = imported_from(tree, "zarr", OPENING)
        self.saving = imported_from(tree, "zarr", SAVING)
        self.handles = set()
        before = None
        while before != self.handles:  # a handle may be made of another one
            before = set(self.handles)
            self.handles |= set(self.bound())

    def bound(self):
        """Names that stand for an array or a group."""
        for node in self.nodes:
            if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr) and self.is_zarr(
                node.value
            ):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                yield from (target.id for target in targets if isinstance(target, ast.Name))
            if isinstance(node, ast.withitem) and self.is_zarr(node.context_expr):
                yield from (n.id for n in [node.optional_vars] if isinstance(n, ast.Name))

    def is_zarr(self, node):
        """Whether an expression gives an array or a group that can be written."""
        if isinstance(node, ast.Name):
            return node.id in self.handles
        if isinstance(node, ast.Subscript):
            return self.is_zarr(node.value)
        if isinstance(node, ast.Attribute):
            return node.attr in VIEWS and self.is_zarr(node.value)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            called = node.func
            return called.attr in {*OPENING, "with_config"} and (
                self.is_module(called.value) or self.is_zarr(called.value)
            )
        return (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in self.opening
        )

    def is_module(self, node):
        return isinstance(node, ast.Name) and node.id in self.modules

    def __iter__(self):
        for node in self.nodes:
            for target in targets_of(node):
                if isinstance(target, ast.Subscript) and self.is_zarr(target.value):
                    yield node.lineno, ast.unparse(target)
            if isinstance(node, ast.Call) and (self.changes(node.func) or self.maps(node)):
                yield node.lineno, ast.unparse(node.func)

    def changes(self, called):
        """Whether a call saves to a place, or changes an array by a method."""
        if isinstance(called, ast.Name):
            return called.id in self.saving
        return isinstance(called, ast.Attribute) and (
            (called.attr in SAVING and self.is_module(called.value))
            or (called.attr in CHANGING and self.is_zarr(called.value))
        )

    def maps(self, call):
        """Whether a call maps over blocks a function that writes to what it is given."""
        called = call.func
        name = called.attr if isinstance(called, ast.Attribute) else getattr(called, "id", "")
        given = {arg.id for arg in call.args if isinstance(arg, ast.Name)}
        functions = [n for n in self.nodes if isinstance(n, ast.FunctionDef) and n.name in given]
        return name in MAPPING and any(map(writes_to_its_arguments, functions))


def targets_of(node):
    """What a statement assigns to, or deletes."""
    found = getattr(node, "targets", [])
    if isinstance(node, ast.AugAssign | ast.AnnAssign):
        found = [node.target]
    for target in found:
        yield from target.elts if isinstance(target, ast.Tuple | ast.List) else [target]


def writes_to_its_arguments(function):
    names = {arg.arg for arg in [*function.args.args, *function.args.kwonlyargs]}
    return any(
        isinstance(target, ast.Subscript) and getattr(target.value, "id", None) in names
        for node in ast.walk(function)
        for target in targets_of(node)
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
        for line, name in ZarrWrites(ast.parse(path.read_text(encoding="utf-8")))
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
    [
        "import zarr\nz = zarr.open_array('a')\nz[0:3] = 1",
        "import zarr\nzarr.open('a')[2] = x",
        "import zarr as z\nz.open('a')[2] = x",
        "import zarr\nz = zarr.open('a')\nz[2] += x",
        "import zarr\nz: object = zarr.open('a')\na, z[2] = x, y",
        "import zarr\ng = zarr.open_group('a')\nh = g['b']\nh[...] = x",
        "import zarr\nzarr.open_array('a').with_config({}).oindex[rows] = x",
        "import zarr\nz = zarr.zeros(3)\nz.vindex[rows] = x",
        "import zarr\nz = zarr.open_array('a')\nz.resize((4, 5))",
        "import zarr\nz = zarr.open_array('a')\nz.append(x)",
        "import zarr\nz = zarr.open_array('a')\nz.set_orthogonal_selection(rows, x)",
        "import zarr\nzarr.save('a', x)",
        "import zarr\nzarr.save_group('a', x=x)",
        "from zarr import save_array as keep\nkeep('a', x)",
        "from zarr import open_array\nopen_array('a')[3] = x",
        "import dask\ndef put(x, z):\n    z[0] = x\n    return x\nda.map_blocks(put, x, z)",
        "def put(x, *, z):\n    z[0] = x\n    return x\nx.map_overlap(put, z=z)",
    ],
)
def test_the_check_sees_writes(source):
    assert list(ZarrWrites(ast.parse(source)))


@pytest.mark.parametrize(
    "source",
    [
        "self.store.dask('x')",
        "store(3)",
        "values[2:3] = 1",
        "import zarr\nx = zarr.open_array('a')[2:3]",
        "import zarr\nrows = []\nrows.append(zarr.open_array('a').shape)",
        "import numpy as np\nnp.save('a', x)",
        "def double(x):\n    return 2 * x\nx.map_blocks(double)",
    ],
)
def test_other_code_passes(source):
    tree = ast.parse(source)
    assert not [*losing_calls(tree), *ZarrWrites(tree)]
