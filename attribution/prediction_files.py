"""Predictions as files: a zarr store, or a table for a spreadsheet."""

import csv
import io
import tempfile
from pathlib import Path

import numpy as np

from attribution.counterfactual import Prediction
from attribution.forget import ForgetSet
from stores import ArraySpec, Provenance, Store, StoreSpec, place, versions, write_file
from stores.folder import Folder

COLUMNS = ("before", "mean", "std", "noise")
HEADER = ("target", "output", *COLUMNS)


def check_writable(path: str) -> None:
    """Refuses a file that cannot be written, before anything costly is computed for it.

    Args:
        path: where to write.

    Raises:
        ValueError: the path is a folder, or lies in none that can be written; or the bucket cannot
            be reached.

    Example:
        >>> check_writable("nowhere/predicted.csv")
        Traceback (most recent call last):
            ...
        ValueError: cannot write 'nowhere/predicted.csv': No such file or directory
    """
    if not isinstance(place(path), Folder):
        return  # a bucket was looked at to make a place of it
    if Path(path).is_dir():
        raise ValueError(f"cannot write {path!r}: a folder has that name")
    try:
        # Permissions alone do not tell: nobody can write to /proc, root included.
        with tempfile.TemporaryFile(dir=Path(path).parent):
            pass
    except OSError as error:
        raise ValueError(f"cannot write {path!r}: {error.strerror}") from error


def check_prediction_file(path: str) -> None:
    """Refuses a file that a prediction cannot be written to, before it is computed.

    Args:
        path: where to write.

    Raises:
        ValueError: another ending than .zarr or .csv, a zarr folder that exists, or a folder that
            cannot be written.

    Example:
        >>> check_prediction_file("predicted.xlsx")
        Traceback (most recent call last):
            ...
        ValueError: predictions are written to .zarr or .csv, got 'predicted.xlsx'
    """
    if not path.endswith((".zarr", ".csv")):
        raise ValueError(f"predictions are written to .zarr or .csv, got {path!r}")
    if path.endswith(".zarr") and place(path).taken():
        raise ValueError(f"{path!r} exists already: name another folder")
    check_writable(path)


def is_prediction_table(content: bytes) -> bool:
    """Whether a file is a table of predictions, as `write_prediction` writes it.

    Args:
        content: of the file.

    Returns:
        Whether it begins with the header of such a table.

    Example:
        >>> is_prediction_table(b"target,output,before,mean,std,noise")
        True
    """
    return content.startswith(",".join(HEADER).encode())


def write_prediction(prediction: Prediction, path: str, forget: ForgetSet) -> None:
    """Writes a prediction, one row a target (zarr) or a target and output (csv).

    Args:
        prediction: what to write.
        path: a .zarr folder or a .csv file.
        forget: the forget set, for the provenance.

    Raises:
        ValueError: the file cannot be written.
    """
    check_prediction_file(path)
    if path.endswith(".csv"):
        _write_csv(prediction, path)
        return
    shape = prediction.mean.shape
    arrays = {name: ArraySpec(("target", "output"), shape, "float32") for name in COLUMNS}
    store = Store.create(
        path,
        StoreSpec("prediction", "target", shape[0], arrays),
        Provenance({"forget": forget.name, "rows": len(forget)}, {"versions": versions("torch")}),
        ids={"target": prediction.targets},
    )
    values = {name: np.asarray(getattr(prediction, name), dtype=np.float32) for name in COLUMNS}
    store.write_block(0, values)
    store.finalize()


def _write_csv(prediction: Prediction, path: str) -> None:
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(HEADER)
    for i, target in enumerate(prediction.targets):
        for c in range(prediction.mean.shape[1]):
            writer.writerow([target, c, *(float(getattr(prediction, n)[i, c]) for n in COLUMNS)])
    write_file(path, text.getvalue().encode())
