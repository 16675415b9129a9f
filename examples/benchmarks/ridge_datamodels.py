"""Ridge datamodels against the matrix products that they are made of, in time and in memory.

python examples/benchmarks/ridge_datamodels.py fits datamodels of 2,000 models x 5,000 rows x 10,000
target outputs, half of them of training rows, in this process on one thread, and prints from one
run:

- the seconds of `fit_datamodels`, from the masks and outputs on disk to the effects on disk;
- the seconds of its matrix products alone, on random numbers of the same shapes, by the same
  function on the same thread, and the ratio of the two;
- the same ratio in processor seconds of the thread that computes, which other work on the machine
  disturbs less (the threads that write files do not count);
- the seconds of the products of the final fit alone by torch, for comparison;
- the peak memory above what the process held before the call, against the budget.
"""

import argparse
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from attribution import Ensemble, Ridge, SquaredError, Task, fit_datamodels
from attribution.dense import product
from attribution.products import products_by
from attribution.regression import HELD_OUT
from attribution.ridge import PIECE
from attribution.ridge_datamodels import COLUMNS, LAMBDAS
from attribution.training import threads
from examples.benchmarks.memory import PeakMemory
from stores import ArraySpec, Provenance, Store, StoreSpec, versions
from unlearning.cost import hardware

ANCHORS = 20
MIB = 2**20


def random_task(rows: int, tests: int) -> Task:
    """A regression whose data no one looks at."""
    data = [TensorDataset(torch.zeros(count, 1), torch.zeros(count)) for count in (rows, tests)]
    return Task("random", *data, lambda: nn.Linear(1, 1), loss=SquaredError())


def write_models(path: Path, task: Task, models: int, seed: int, *, full: bool) -> Ensemble:
    """Models whose outputs are linear in their masks, with as much noise."""
    random = np.random.default_rng(seed)
    rows, targets = len(task.train_ids), len(task.target_ids)
    masks = np.ones((models, rows), bool) if full else random.random((models, rows)) < 0.5
    array = ArraySpec(("model", "target", "output"), (models, targets, 1), "float32")
    store = Store.create(
        path,
        StoreSpec("ensemble", "model", min(50, models), {"outputs": array}),
        Provenance({"seed": seed}),
        constants={"mask": masks, "judge": np.ones(models, bool)},
        ids={"train": task.train_ids, "target": task.target_ids},
        attributes={"design": "half", "seed": seed, "without": [], "keys": []},
    )
    effects = np.random.default_rng(0).standard_normal((rows, targets), np.float32)
    for block in store.pending():
        span = store.spec.span(block)
        outputs = masks[span].astype(np.float32) @ effects / rows**0.5
        outputs += random.standard_normal(outputs.shape, np.float32)
        store.write_block(block, {"outputs": outputs[:, :, None]})
    return Ensemble.open(store.finalize().path, task)


def fit_products(models: int, rows: int, columns: int, own: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Pairs of matrices that a fit multiplies, for so many target outputs, `own` of train rows."""
    held, rank = int(HELD_OUT * models) + 1, min(models, rows)
    seen, basis, masks = torch.rand(models, rows), torch.rand(rank, models), torch.rand(rank, rows)
    if models <= rows:
        for part in seen.split(PIECE, 1):
            wide = part.double()
            yield wide, wide.T
        yield basis, seen
    else:
        yield seen.T, seen
    asked, known = torch.rand(held, rank), torch.rand(held, held)
    for start in range(0, columns, COLUMNS):
        count = min(COLUMNS, columns - start)
        yield basis, torch.rand(models, count)
        # Residuals of the masks of the targets' own rows are looked at, too.
        some = torch.rand(rank, count + max(0, min(count, own - start)))
        few = torch.rand(held, count)
        for _ in LAMBDAS:
            yield asked, some
            yield known, few
    dual = torch.rand(rank, 4096)
    for start in range(0, columns, 4096):
        yield masks.T, dual[:, : columns - start]


def now() -> np.ndarray:
    """Wall time, and processor time of this thread, in seconds."""
    return np.array([time.perf_counter(), time.thread_time()])


def seconds_of_products(models: int, rows: int, columns: int, own: int) -> np.ndarray:
    """Seconds of all products of a fit, as `now` tells them; making matrices does not count."""
    taken = np.zeros(2)
    for a, b in fit_products(models, rows, columns, own):
        start = now()
        product(a, b)
        taken += now() - start
    return taken


def seconds_by_torch(models: int, rows: int, columns: int) -> float:
    """Seconds of the final fit's two products by torch."""
    basis, masks = torch.rand(models, models), torch.rand(rows, models)
    outputs = torch.rand(models, columns)
    start = time.perf_counter()
    masks @ (basis @ outputs)
    return time.perf_counter() - start


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", type=int, default=2000)
    parser.add_argument("--rows", type=int, default=5000)
    parser.add_argument("--tests", type=int, default=5000)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    models, rows, targets = options.models, options.rows, options.rows + options.tests
    task = random_task(rows, options.tests)
    print(f"{hardware()}; {versions('torch', 'numpy')}; products by {products_by()}; 1 thread")
    with threads(1), tempfile.TemporaryDirectory() as folder:
        ensemble = write_models(Path(folder) / "subsets", task, models, 1, full=False)
        anchor = write_models(Path(folder) / "full", task, ANCHORS, 2, full=True)
        alone = seconds_of_products(models, rows, targets, rows)
        with PeakMemory() as memory:
            start = now()
            # Whether own rows are free is not looked for: what is timed is what is counted.
            fit_datamodels(
                ensemble,
                anchor=anchor,
                to=Path(folder) / "datamodel",
                method=Ridge(free=False),
                dtype=options.dtype,
            )
            taken = now() - start
        again = seconds_of_products(models, rows, targets, rows)
        by_torch = seconds_by_torch(models, rows, targets)
    products = (alone + again) / 2
    print(f"{models} models x {rows} rows x {targets} target outputs, stored as {options.dtype}")
    print(f"fit_datamodels:         {taken[0]:.2f} s")
    print(f"its products alone:     {products[0]:.2f} s ({alone[0]:.2f}, {again[0]:.2f} after)")
    ratio = taken / products
    print(f"ratio:                  {ratio[0]:.2f}; of processor seconds {ratio[1]:.2f}")
    print(f"final fit's, by torch:  {by_torch:.2f} s")
    budget = memory_budget(models, rows)
    print(f"peak memory above start: {memory.peak / MIB:.0f} MiB, budget {budget / MIB:.0f} MiB")


def memory_budget(models: int, rows: int) -> int:
    """Bytes that a fit may take: 256 MiB of a block, the masks three times, four Gram matrices."""
    return 2**28 + 3 * 4 * models * rows + 4 * 8 * models**2


if __name__ == "__main__":
    main()
