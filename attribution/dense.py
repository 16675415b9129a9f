"""Large products and eigenvectors on the CPU, by OpenBLAS where torch would be slower.

What computes them, and hence their last bits, depends on the machine and on what is installed, as
`products_by` tells, but not on the number of cores where torch is held to one thread.
"""

import ctypes

import torch
from torch import Tensor

from attribution.products import _library, can_multiply, multiply

_COLUMN_MAJOR = 102


def product(a: Tensor, b: Tensor) -> Tensor:
    """Product of two large matrices.

    Args:
        a: left matrix, [row, inner].
        b: right matrix, [inner, column].

    Returns:
        a b, [row, column].

    Example:
        >>> product(torch.ones(2, 3), torch.ones(4, 3).T)[0]
        tensor([3., 3., 3., 3.])
    """
    pair = a[None], b[None]
    return multiply(*pair)[0] if can_multiply(*pair) else a @ b


def eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors of a symmetric matrix, by LAPACK's divide and conquer.

    Args:
        matrix: [size, size], float64.

    Returns:
        Eigenvalues in rising order, [size], and the eigenvectors as columns, [size, size].

    Example:
        >>> values, vectors = eigenvectors(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double())
        >>> values.round(decimals=6).tolist()
        [1.0, 3.0]
    """
    library = _library()
    if library is None:
        values, vectors = torch.linalg.eigh(matrix)
        return values, vectors
    vectors, values = matrix.clone(), matrix.new_empty(len(matrix))
    sizes = ctypes.c_int(len(matrix)), ctypes.c_void_p(vectors.data_ptr()), len(matrix)
    state = library.scipy_LAPACKE_dsyevd(
        *(_COLUMN_MAJOR, ctypes.c_char(b"V"), ctypes.c_char(b"L"), *sizes),
        ctypes.c_void_p(values.data_ptr()),
    )
    if state:
        raise ValueError(f"the eigenvectors were not found (LAPACK's dsyevd gave {state})")
    return values, vectors.T
