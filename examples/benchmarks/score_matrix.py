"""Writing a matrix of TRAK scores against a loop written by hand, in time and in memory.

python examples/benchmarks/score_matrix.py computes scores of 20,000 rows on as many targets from
512 features each, stored as float16, and prints from one run:

- the seconds of `fit_trak`, from the features on disk to the scores on disk: the curvature, the
  solved rows, and [20,000 x 512] @ [512 x 20,000] with the strongest rows, sums and scales;
- the seconds of a loop that multiplies as much by torch, rounds and writes to a zarr array, before
  and after, on as many threads as `fit_trak` has processes; and the ratio;
- the same ratio in processor seconds of this process's first thread, without workers, which other
  work on the machine disturbs less (the threads that write files do not count);
- the peak memory above the start, workers included, at two numbers of rows.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import zarr
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attribution import Model, SquaredError, Task
from attribution.gradients import Features, Projection, featurize
from attribution.products import products_by
from attribution.training import threads
from attribution.trak import fit_trak
from examples.benchmarks.memory import PeakMemory
from stores import versions
from unlearning.cost import hardware

WIDTH = 512
HEIGHT = 512  # rows that the loop writes at once
MIB = 2**20


def linear() -> nn.Module:
    """A model whose gradient has as many numbers as its input, and one for the bias."""
    return nn.Linear(WIDTH - 1, 1)


def make_features(rows: int, tests: int, to: Path) -> Features:
    """Features of random rows, as they are: none is projected."""
    random = torch.Generator().manual_seed(0)
    data = [
        TensorDataset(torch.randn(count, WIDTH - 1, generator=random), torch.zeros(count))
        for count in (rows, tests)
    ]
    task = Task("random", *data, linear, loss=SquaredError())
    torch.manual_seed(0)
    model = Model(task, linear().state_dict())
    return featurize(task, [model], to, projection=Projection(inputs=WIDTH, outputs=1))


def torch_loop(rows: Tensor, columns: Tensor, to: Path) -> None:
    """The same matrix, by hand: [rows, k] @ [k, targets] to a new zarr array, in float16."""
    shape = len(rows), columns.shape[1]
    array = zarr.create_array(
        to, shape=shape, chunks=(HEIGHT, shape[1]), dtype="float16", compressors=None
    )
    for start in range(0, shape[0], HEIGHT):
        array[start : start + HEIGHT] = (rows[start : start + HEIGHT] @ columns).half().numpy()


def now() -> np.ndarray:
    """Wall time, and processor time of this thread, in seconds."""
    return np.array([time.perf_counter(), time.thread_time()])


def seconds_of_loop(rows: int, targets: int, to: Path) -> np.ndarray:
    """Seconds, as `now` tells them, of the loop on random numbers that are in memory already."""
    left, right = torch.randn(rows, WIDTH), torch.randn(WIDTH, targets)
    start = now()
    torch_loop(left, right, to)
    return now() - start


def fit(rows: int, targets: int, workers: int) -> tuple[np.ndarray, int]:
    """Seconds of `fit_trak`, as `now` tells them, and its peak memory in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        features = make_features(rows, targets - rows, Path(folder) / "features")
        with PeakMemory() as memory:
            start = now()
            fit_trak(features, Path(folder) / "trak", damping=1.0, dtype="float16", workers=workers)
            return now() - start, memory.peak


def main() -> None:
    """Prints the ratio and the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--workers", type=int, default=0)
    options = parser.parse_args()
    rows, targets = options.rows, options.rows + 1
    many = max(1, options.workers)
    print(f"{hardware()}; {versions('torch', 'zarr')}; products by {products_by()}; {many} threads")
    with threads(many), tempfile.TemporaryDirectory() as folder:
        before = seconds_of_loop(rows, targets, Path(folder) / "before")
        taken, peak = fit(rows, targets, options.workers)
        after = seconds_of_loop(rows, targets, Path(folder) / "after")
        _, less = fit(rows // 4, targets // 4, options.workers)
    print(f"{rows} rows x {targets} targets of {WIDTH} features")
    loop = (before + after) / 2
    print(f"fit_trak:   {taken[0]:.2f} s")
    print(f"torch loop: {loop[0]:.2f} s ({before[0]:.2f} before, {after[0]:.2f} after)")
    ratio = taken / loop
    told = "" if options.workers else f"; of processor seconds {ratio[1]:.2f}"
    print(f"ratio:      {ratio[0]:.2f}{told}")
    print(f"peak memory above start: {peak / MIB:.0f} MiB; of a quarter of both: {less / MIB:.0f}")


if __name__ == "__main__":
    main()
