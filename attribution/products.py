"""Products of many small float32 matrices on the CPU, by OpenBLAS where torch would be slower.

torch's own library runs its AVX-512 kernels on Intel processors only, and has no short path for
many small products. OpenBLAS has both, but does not recognise every processor either, so it is
told which kernels to take.
"""

import ctypes
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROW_MAJOR, PLAIN, TRANSPOSED = 101, 111, 112
LARGEST = 2**31 - 1
# Below so many columns a product with a transposed right side is faster than making a copy of it.
COPIED_FROM = 16


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
    library = _library()
    left, right = _layout(a), _layout(b)
    if library is None or left is None or right is None:
        return torch.bmm(a, b)
    (models, rows, inner), columns = a.shape, b.shape[2]
    copied = left[0] == PLAIN and columns >= COPIED_FROM
    if copied and b.stride() == (inner * columns, 1, inner):
        # All transposed matrices side by side, [inner, model, column].
        b = _transposed(library, b, models * columns, inner)
        right = (PLAIN, models * columns, columns)
    out = torch.empty(models, rows, columns)
    library.scipy_cblas_sgemm_batch_strided(
        *(ROW_MAJOR, left[0], right[0], rows, columns, inner),
        *(1.0, a.data_ptr(), *left[1:], b.data_ptr(), *right[1:]),
        *(0.0, out.data_ptr(), columns, rows * columns, models),
    )
    return out


def _layout(x: Tensor) -> tuple[int, int, int] | None:
    """Order of the elements, step between rows (columns if transposed), step between models."""
    _, rows, columns = x.shape
    model, row, column = x.stride()
    if column == 1 and row >= columns:
        return PLAIN, row, model
    if row == 1 and column >= rows:
        return TRANSPOSED, column, model
    return None


def _transposed(library: ctypes.CDLL, b: Tensor, rows: int, inner: int) -> Tensor:
    side = torch.empty(inner, rows)
    library.scipy_cblas_somatcopy(
        ROW_MAJOR, TRANSPOSED, rows, inner, 1.0, b.data_ptr(), inner, side.data_ptr(), rows
    )
    return side
