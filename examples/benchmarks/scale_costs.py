"""What large problems cost: bytes, seconds, core-hours and GPU-hours, from measured unit costs.

python examples/benchmarks/scale_costs.py measures on this machine, for one core: products of
matrices, training steps of a ResNet-9, writing and summing stored rows; then it works out three
problems with the formulas below and prints a table. A GPU is not measured here: its rate is that
of a published run, 3.6e14 operations of a small convolutional network in 2.59 s on one A100 (Jordan
2024, arXiv 2404.00498).

    n training rows, t targets, r rows of either kind, c outputs each, m subset models, e epochs,
    f operations of one forward pass of one row (a training step takes 3 f), k features,
    p checkpoints

    bytes     masks m n; outputs 4 m t c; scores 2 n t c and features 2 p r c k in float16, which is
              an option of fit_datamodels, fit_trak and featurize (twice that in float32)
    train     m models on half of the rows: 3 f e m n / 2
    ridge     Gram of the models in float64, which counts twice, and rotations 2 m^2 (2 n + t c),
              scores 2 m n t c
    features  p checkpoints, one backward pass an output: f p r (1 + 2 c)
    TRAK      Gram 2 p n c k^2, scores 2 p n k t c
    query     100 rows of the scores read and summed: 200 t c bytes
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from attribution.training import threads
from examples.cifar import resnet9
from stores import ArraySpec, Provenance, Store, StoreSpec, score_block, total, versions
from unlearning.cost import hardware

A100 = 3.6e14 / 2.59  # operations a second
HOUR = 3600


@dataclass(frozen=True)
class Problem:
    """A problem on paper.

    Args:
        name: what it is like.
        n: training rows.
        t: targets.
        r: rows that are training rows, targets or both.
        c: outputs of each.
        f: operations of one forward pass of one row.
        e: epochs of one training.
        m: models trained on subsets; 0 where nothing is retrained.
        k: features.
        p: checkpoints.
    """

    name: str
    n: float
    t: float
    r: float
    c: float
    f: float
    e: float
    m: float
    k: float
    p: float

    def nbytes(self) -> dict[str, float]:
        """Bytes of each kind of store."""
        return {
            "masks": self.m * self.n,
            "outputs": 4 * self.m * self.t * self.c,
            "scores": 2 * self.n * self.t * self.c,
            "features": 2 * self.p * self.r * self.c * self.k,
        }

    def operations(self) -> dict[str, float]:
        """Operations of each step."""
        n, t, c, m, k, p = self.n, self.t, self.c, self.m, self.k, self.p
        return {
            "train": 3 * self.f * self.e * m * n / 2,
            "ridge": 2 * m**2 * (2 * n + t * c) + 2 * m * n * t * c,
            "features": self.f * p * self.r * (1 + 2 * c),
            "TRAK": 2 * p * n * c * k**2 + 2 * p * n * k * t * c,
        }


CIFAR = Problem("CIFAR-10, ResNet-9", 50e3, 60e3, 60e3, 10, 7.6e8, 24, 20e3, 2048, 8)
IMAGENET = Problem("ImageNet, ResNet-18, margins", 1.3e6, 50e3, 1.35e6, 1, 3.6e9, 16, 0, 2048, 4)
LANGUAGE = Problem(
    "10^9 parameters, 512 tokens a row, LoRA features",
    1e6,
    1e4,
    1.01e6,
    1,
    2e9 * 512,
    1,
    0,
    4096,
    1,
)


@dataclass(frozen=True)
class Units:
    """Measured for one core.

    Args:
        products: operations a second of float32 products.
        network: operations a second of training steps of a convolutional network.
        write: bytes a second that are written as blocks of a store.
        query: bytes a second that are read from memory and summed.
    """

    products: float
    network: float
    write: float
    query: float


def seconds(work: Callable[[], object], repeats: int = 5) -> float:
    """Median time of a piece of work, after one run to warm up."""
    taken = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return median(taken[1:])


def measure() -> Units:
    """Unit costs of this machine's core."""
    torch.manual_seed(0)
    a, b = torch.randn(2000, 1024), torch.randn(1024, 3000)
    products = 2 * 2000 * 1024 * 3000 / seconds(lambda: a @ b)
    module, rows = resnet9(), torch.randn(64, 3, 32, 32)
    step = seconds(lambda: module(rows).sum().backward())
    with tempfile.TemporaryDirectory() as folder:
        write, query = _stored(Path(folder))
    return Units(products, 3 * forward_operations(module, rows[:1]) * 64 / step, write, query)


def _stored(folder: Path) -> tuple[float, float]:
    rows, targets = 4000, 20_000
    array = ArraySpec(("train", "target"), (rows, targets), "float16")
    spec = StoreSpec("a", "target", score_block(targets, 1, "float16"), {"a": array})
    store, height = Store.create(folder / "a", spec, Provenance({})), spec.chunks("a")[0]
    values = np.random.default_rng(0).normal(size=(height, targets)).astype(np.float16)
    start = time.perf_counter()
    for block in range(spec.blocks):
        span = spec.span(block)
        with store.writing(block) as writer:
            for first in range(0, rows, height):
                part = values[: min(height, rows - first), span]
                writer.append("a", np.ascontiguousarray(part))
    written = array.nbytes / (time.perf_counter() - start)
    wanted = np.random.default_rng(1).choice(rows, 100, replace=False)
    return written, 200 * targets / seconds(lambda: total(store, "a", wanted), 20)


def forward_operations(module: torch.nn.Module, row: torch.Tensor) -> float:
    """Operations of one forward pass of one row: two for each weight that is used at each place."""
    found = []

    def count(layer: torch.nn.Module, _: object, outputs: torch.Tensor) -> None:
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        found.append(2.0 * weight[0].numel() * outputs[0].numel())

    kinds = (torch.nn.Conv2d, torch.nn.Linear)
    handles = [m.register_forward_hook(count) for m in module.modules() if isinstance(m, kinds)]
    module.eval()(row)
    for handle in handles:
        handle.remove()
    module.train()
    return sum(found)


def table(problem: Problem, units: Units) -> list[str]:
    """Lines of one problem."""
    lines = [f"{problem.name}: {problem.n:,.0f} rows x {problem.t:,.0f} targets x {problem.c:.0f}"]
    stored = ", ".join(f"{name} {_bytes(size)}" for name, size in problem.nbytes().items() if size)
    lines.append(f"  bytes: {stored}")
    rates = {"train": units.network, "features": units.network}
    for name, work in problem.operations().items():
        if work:
            cores, gpu = work / rates.get(name, units.products) / HOUR, work / A100 / HOUR
            lines.append(
                f"  {name}: {work:.1e} operations, {cores:,.3g} core-h or {gpu:,.3g} A100-h"
            )
    scores = problem.nbytes()["scores"]
    lines.append(f"  writing the scores: {scores / units.write / HOUR:.2g} core-h")
    lines.append(
        f"  query of 100 rows in memory: {200 * problem.t * problem.c / units.query:.2g} s"
    )
    return lines


def _bytes(size: float) -> str:
    for unit, name in ((1e12, "TB"), (1e9, "GB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size / 1e6:.3g} MB"


def main() -> None:
    """Prints the unit costs and the table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with threads(1):
        units = measure()
    print(f"{hardware()}; {versions('torch', 'numpy', 'zarr')}; one core:")
    print(f"products {units.products / 1e9:.0f} and network {units.network / 1e9:.0f} GFLOP/s")
    print(f"writing {units.write / 1e6:.0f}, summing rows {units.query / 1e6:.0f} MB/s")
    for problem in (CIFAR, IMAGENET, LANGUAGE):
        print("\n".join(table(problem, units)))


if __name__ == "__main__":
    main()
