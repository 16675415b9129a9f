"""Projected per-example gradients against a plain forward and backward pass, and against `trak`.

python examples/benchmarks/gradient_features.py prints, from one run on this machine:

- the cost of `features` (the gradient of each row's margin; at random 256 features a layer, and as
  many as `Projection` has; along principal directions as many as a run has) over that of a plain
  batched forward and backward pass on the cat/dog CNN, timed in turns;
- the seconds in which the principal directions are found, once a training, from 2,048 rows;
- where the `trak` package is installed, the cost of its `featurize` (proj_dim 2,048, CPU, float32,
  at the fastest of a few batch sizes) over ours, a row;
- the peak memory of `featurize` at two numbers of rows, each in a process of its own.
"""

import argparse
import importlib.util
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

from attribution import CrossEntropy, Model, Task
from attribution.gradients import (
    Directions,
    Projection,
    featurize,
    gradient_projector,
    output_cotangents,
    principal_directions,
)
from attribution.gradients.principal import ROWS as PRINCIPAL_ROWS
from attribution.precompute import PRINCIPAL
from attribution.training import threads
from examples.cifar import cnn
from examples.digits import mlp
from stores import versions
from unlearning.cost import hardware

BATCH = 64  # rows a pass, of the plain one and of ours
SMALL = Projection(inputs=16, outputs=32, features=256)
RUN = Projection(principal=PRINCIPAL)
TRAK_WIDTH = 2048
TRAK_BATCHES = (64, 256, 1024)  # rows
OUR_REPEATS = 10  # passes of ours between two batches of trak's
MEMORY_ROWS = (2_000, 8_000)


def images(rows: int) -> tuple[Tensor, Tensor]:
    """Random images and labels; the time does not depend on what they show."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 3, 32, 32, generator=random)
    return inputs, torch.randint(2, (rows,), generator=random)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_pass(module: nn.Module) -> Callable[[], None]:
    """A batched forward and backward pass, with the gradients of all weights."""
    inputs, labels = images(BATCH)

    def run() -> None:
        module.zero_grad()
        cross_entropy(module(inputs), labels).backward()

    return run


def our_pass(
    module: nn.Module,
    projection: Projection = SMALL,
    directions: Mapping[str, Directions] | None = None,
) -> Callable[[], Tensor]:
    """Features of the margin of each row of a batch, [row, 1, k]."""
    inputs, labels = images(BATCH)
    projector = gradient_projector(module, projection, 0, directions)
    state, loss = module.state_dict(), CrossEntropy()

    def run() -> Tensor:
        return projector.features(
            state, inputs, lambda outputs: output_cotangents(loss, outputs, labels, "margin")
        )

    return run


def directions_of(module: nn.Module) -> tuple[Mapping[str, Directions], float]:
    """Principal directions of random images, and the seconds that they take."""
    data = TensorDataset(*images(PRINCIPAL_ROWS))
    task = Task("random images", data, data, cnn)
    models, found = [Model(task, module.state_dict())], {}
    taken = seconds(lambda: found.update(principal_directions(task, models, RUN)))
    return found, taken


def in_turns(*works: Callable[[], object], repeats: int) -> list[list[float]]:
    """Seconds of each repeat of each of several functions, after three turns that do not count."""
    turns = [[seconds(work) for work in works] for _ in range(3 + repeats)]
    return [list(taken) for taken in zip(*turns[3:], strict=True)]


def trak_and_ours(module: nn.Module, batch: int, repeats: int) -> list[tuple[float, float]]:
    """Seconds a row, in turns, of the `trak` package's featurize in batches and of ours."""
    from trak import TRAKer

    ours = our_pass(module)
    inputs, labels = images(batch)
    with tempfile.TemporaryDirectory() as folder:
        traker = TRAKer(
            model=module,
            task="image_classification",
            train_set_size=repeats * batch,
            save_dir=folder,
            device="cpu",
            proj_dim=TRAK_WIDTH,
            use_half_precision=False,
            logging_level=logging.ERROR,
        )
        traker.load_checkpoint(module.state_dict(), model_id=0)
        pairs = []
        for _ in range(repeats):
            taken = seconds(lambda: traker.featurize(batch=(inputs, labels), num_samples=batch))
            (own,) = in_turns(ours, repeats=OUR_REPEATS)
            pairs.append((taken / batch, median(own) / BATCH))
        return pairs


def peak_memory(rows: int) -> int:
    """Peak memory in bytes of a process that featurises so many rows of the digits' MLP."""
    command = [sys.executable, __file__, "--featurize", str(rows)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def featurize_rows(rows: int) -> None:
    """Featurises random rows and prints this process's peak memory in bytes."""
    random = torch.Generator().manual_seed(0)
    inputs = torch.randn(rows, 64, generator=random)
    labels = torch.randint(10, (rows,), generator=random)
    data = TensorDataset(inputs, labels)
    task = Task("random rows", data, TensorDataset(inputs[:1], labels[:1]), mlp)
    with tempfile.TemporaryDirectory() as folder:
        model = Model(task, task.new_model(0).state_dict())
        featurize(task, [model], f"{folder}/features", projection=RUN)
    print(_own_peak())


def _own_peak() -> int:
    """Peak memory of this process in bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # What getrusage tells on Linux starts at the size of the process that started this one.
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    # In bytes on macOS, in kilobytes elsewhere.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def main() -> None:
    """Prints the ratios and the peaks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--trak-repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--featurize", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.featurize:
        featurize_rows(options.featurize)
        return
    torch.manual_seed(0)
    module = cnn().eval()
    weights = sum(parameter.numel() for parameter in module.parameters())
    print(f"{hardware()}; {versions('torch', 'traker')}; {options.threads} threads")
    with threads(options.threads):
        print(
            f"CNN of {weights} parameters, batch {BATCH}, {options.repeats} repeats in turns,"
            " median (range)"
        )
        directions, taken = directions_of(module)
        for ours in (
            our_pass(module),
            our_pass(module, Projection()),
            our_pass(module, RUN, directions),
        ):
            _compare_with_plain(ours, *in_turns(plain_pass(module), ours, repeats=options.repeats))
        print(f"principal directions of {PRINCIPAL_ROWS} rows: {taken:.3g} s")
        _compare_with_trak(module, options.trak_repeats)
    peaks = [peak_memory(rows) for rows in MEMORY_ROWS]
    for rows, peak in zip(MEMORY_ROWS, peaks, strict=True):
        print(f"peak memory of featurize, {rows} rows of 10 outputs: {peak / 2**20:.0f} MiB")
    print(f"peak at {MEMORY_ROWS[1]} rows / at {MEMORY_ROWS[0]}: {peaks[1] / peaks[0]:.3f}")


def _compare_with_plain(ours: Callable[[], Tensor], plain: list[float], taken: list[float]) -> None:
    print(f"plain forward + backward: {_told([1e3 * s / BATCH for s in plain])} ms a row")
    print(f"{ours().shape[2]} features of the margin: {_told([1e3 * s / BATCH for s in taken])}")
    print(f"features / plain: {_told([b / a for a, b in zip(plain, taken, strict=True)])}")


def _compare_with_trak(module: nn.Module, repeats: int) -> None:
    if importlib.util.find_spec("trak") is None:
        print("trak: not installed (pip install traker)")
        return
    pairs = {batch: trak_and_ours(module, batch, repeats) for batch in TRAK_BATCHES}
    theirs = {batch: [taken for taken, _ in each] for batch, each in pairs.items()}
    ratios = {batch: [taken / own for taken, own in each] for batch, each in pairs.items()}
    for batch, taken in theirs.items():
        told = f"{_told([1e3 * s for s in taken])} ms a row, {_told(ratios[batch])} x ours"
        print(f"trak, proj_dim {TRAK_WIDTH}, batch {batch}: {told}")
    fastest = min(theirs, key=lambda batch: median(theirs[batch]))
    print(f"trak at its fastest batch / ours: {_told(ratios[fastest])}")


def _told(values: list[float]) -> str:
    return f"{median(values):.4g} ({min(values):.4g}-{max(values):.4g})"


if __name__ == "__main__":
    main()
