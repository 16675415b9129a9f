"""Products of many small float32 matrices on the CPU, by OpenBLAS where torch would be slower.

torch's own library runs its AVX-512 kernels on Intel processors only, and has no short path for
many small products. OpenBLAS has both, but does not recognise every processor either, so it is
told which kernels to take.
"""

import ctypes
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
LARGEST = 2**31 - 1
# Products of fewer columns than that are too narrow for a vector register.
NARROW = 16
_Shape = tuple[int, ...]
_Layout = tuple[int, int, int]


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _overlooked() -> bool:
    """Whether this processor has AVX-512 and torch's own library does not use it."""
    try:
        described = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    able: str = torch.backends.cpu.get_cpu_capability()
    return able == "AVX512" and "AuthenticAMD" in described


@cache
def _library() -> ctypes.CDLL | None:
    spec = find_spec("scipy_openblas32")
    if spec is None or spec.origin is None or not _overlooked():
        return None
    found = sorted((Path(spec.origin).parent / "lib").glob("libscipy_openblas.*"))
    files = [path for path in found if path.suffix in (".so", ".dylib", ".dll")]
    if not files:
        return None
    # Read while the library is loaded, by this copy of it alone.
    with _environment({"OPENBLAS_CORETYPE": "SKYLAKEX", "OPENBLAS_NUM_THREADS": "1"}):
        library = ctypes.CDLL(str(files[0]))
    whole, pointer, real = ctypes.c_int, ctypes.c_void_p, ctypes.c_float
    left: list[Any] = [real, pointer, whole, whole]
    right: list[Any] = [pointer, whole, whole]
    product, copy = library.scipy_cblas_sgemm_batch_strided, library.scipy_cblas_somatcopy
    product.argtypes = [*[whole] * 6, *left, *right, real, *right, whole]
    copy.argtypes = [*[whole] * 4, real, pointer, whole, pointer, whole]
    product.restype = copy.restype = None
    library.scipy_openblas_get_config.restype = ctypes.c_char_p
    return library


def products_by() -> str:
    """What computes these products in this process: it depends on machine and installation only.

    Returns:
        "torch", or the version of OpenBLAS and its kernels.

    Example:
        >>> isinstance(products_by(), str)
        True
    """
    library = _library()
    return "torch" if library is None else str(library.scipy_openblas_get_config().decode())


def can_multiply(a: Tensor, b: Tensor) -> bool:
    """Whether `multiply` takes tensors of these shapes, dtypes and devices.

    Args:
        a: left matrices, [model, row, inner].
        b: right matrices, [model, inner, column].

    Returns:
        True where OpenBLAS is there and both are float32 on the CPU and not empty.

    Example:
        >>> can_multiply(torch.zeros(2, 3, 4, dtype=torch.float64), torch.zeros(2, 4, 5))
        False
    """
    return _library() is not None and all(
        x.dtype is torch.float32 and x.device.type == "cpu" and 0 < x.numel() <= LARGEST
        for x in (a, b)
    )


def multiply(a: Tensor, b: Tensor) -> Tensor:
    """Products of pairs of matrices, out_m = a_m b_m, on one thread.

    Args:
        a: left matrices, [model, row, inner], float32.
        b: right matrices, [model, inner, column], float32.

    Returns:
        Products, [model, row, column].

    Example:
        >>> a, b = torch.ones(2, 3, 4), torch.ones(2, 5, 4).mT
        >>> multiply(a, b).shape if can_multiply(a, b) else torch.Size([2, 3, 5])
        torch.Size([2, 3, 5])
    """
    return _product(a.shape, a.stride(), b.shape, b.stride())(a, b)


def is_narrow(a: Tensor, b: Tensor) -> bool:
    """Whether the products of these have so few columns that `multiply_narrow` is faster."""
    return b.shape[2] < NARROW <= a.shape[1]


def multiply_narrow(a: Tensor, b: Tensor) -> Tensor:
    """Products of pairs of matrices like `multiply`, that lie transposed in memory.

    Few columns leave vector registers half empty, here and wherever a kernel goes along the rows
    of the product afterwards; many rows fill them.

    Args:
        a: left matrices, [model, row, inner], float32.
        b: right matrices, [model, inner, column], float32.

    Returns:
        Products, [model, row, column], the rows beside each other.

    Example:
        >>> multiply_narrow(torch.ones(2, 30, 4), torch.ones(2, 4, 5)).shape
        torch.Size([2, 30, 5])
    """
    return multiply(b.mT, a.mT).mT


@lru_cache(maxsize=1024)
def _product(
    shape: _Shape, stride: _Shape, right_shape: _Shape, right_stride: _Shape
) -> Callable[[Tensor, Tensor], Tensor]:
    library = _library()
    left, right = _layout(shape, stride), _layout(right_shape, right_stride)
    if library is None or left is None or right is None:
        return torch.bmm
    models, rows, inner = shape
    columns = right_shape[2]
    along = left[0] == PLAIN and right[0] == TRANSPOSED
    if along and min(rows, columns) >= NARROW and stride == (rows * inner, inner, 1):
        # OpenBLAS is slow where both sides lie along the inner axis, slower than with a copy.
        beside = (TRANSPOSED, models * rows, rows)
        product = _strided(library, (models, rows, columns, inner), beside, right)
        turn = _transposition(library, models * rows, inner)
        return lambda a, b: product(turn(a), b)
    return _strided(library, (models, rows, columns, inner), left, right)


def _layout(shape: _Shape, stride: _Shape) -> _Layout | None:
    """Order of the elements, step between rows (columns if transposed), step between models."""
    (_, rows, columns), (model, row, column) = shape, stride
    if column == 1 and row >= columns:
        return PLAIN, row, model
    if row == 1 and column >= rows:
        return TRANSPOSED, column, model
    return None


def _strided(
    library: ctypes.CDLL, sizes: tuple[int, int, int, int], left: _Layout, right: _Layout
) -> Callable[[Tensor, Tensor], Tensor]:
    models, rows, columns, _ = sizes
    # Numbers are turned into those of C here, once, because that takes longer than the call.
    whole = [ctypes.c_int(x) for x in (ROW_MAJOR, left[0], right[0], *sizes[1:])]
    call = partial(library.scipy_cblas_sgemm_batch_strided, *whole, ctypes.c_float(1.0))
    row, model, right_row, right_model, count = map(ctypes.c_int, (*left[1:], *right[1:], models))
    nothing, out_row, out_model = (
        ctypes.c_float(0.0),
        ctypes.c_int(columns),
        ctypes.c_int(rows * columns),
    )

    def product(a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(models, rows, columns)
        at, right_at, out_at = a.data_ptr(), b.data_ptr(), out.data_ptr()
        call(
            at,
            row,
            model,
            right_at,
            right_row,
            right_model,
            nothing,
            out_at,
            out_row,
            out_model,
            count,
        )
        return out

    return product


def _transposition(library: ctypes.CDLL, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
    whole = [ctypes.c_int(x) for x in (ROW_MAJOR, TRANSPOSED, rows, columns)]
    call = partial(library.scipy_cblas_somatcopy, *whole, ctypes.c_float(1.0))
    row, out_row = ctypes.c_int(columns), ctypes.c_int(rows)

    def transposed(x: Tensor) -> Tensor:
        out = torch.empty(columns, rows)
        call(x.data_ptr(), row, out.data_ptr(), out_row)
        return out

    return transposed
