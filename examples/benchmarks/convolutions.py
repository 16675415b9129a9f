"""Convolutions on a processor: models many at once, one by one, and with channels last in memory.

python examples/benchmarks/convolutions.py prints, for networks of several sizes, the milliseconds a
model for one step of training and for its outputs, on one thread: many at once (vectorised), one by
one with the channels first, and one by one as they are computed here.
"""

import time
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from unittest.mock import patch

import torch
from torch import nn

from attribution import CrossEntropy
from attribution.descent import SGD, Batch, Descent, stack
from attribution.outputs import evaluate, evaluate_many
from attribution.paths import multiplications
from attribution.training import threads
from examples.cifar import cnn
from unlearning.cost import hardware

MODELS, ROWS, OUTPUT_ROWS, STEPS = 10, 32, 512, 8
Shape = tuple[int, int, int]


def network(shape: Shape, *widths: int) -> nn.Module:
    """Convolutions of 3 x 3 pixels, the first of them followed by a pooling, and a linear layer."""
    layers: list[nn.Module] = []
    channels, height, width = shape
    for number, wide in enumerate(widths):
        layers += [nn.Conv2d(channels, wide, 3, padding=1), nn.ReLU()]
        layers += [nn.MaxPool2d(2)] if number == 0 else []
        channels = wide
    return nn.Sequential(
        *layers, nn.Flatten(), nn.Linear(channels * (height // 2) * (width // 2), 2)
    )


CASES: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "8 x 8, widths 4": (partial(network, (1, 8, 8), 4), (1, 8, 8)),
    "8 x 8, widths 8, 8": (partial(network, (1, 8, 8), 8, 8), (1, 8, 8)),
    "8 x 8, widths 16, 32": (partial(network, (1, 8, 8), 16, 32), (1, 8, 8)),
    "8 x 8, widths 32, 64": (partial(network, (1, 8, 8), 32, 64), (1, 8, 8)),
    "16 x 16, widths 8, 16": (partial(network, (3, 16, 16), 8, 16), (3, 16, 16)),
    "28 x 28, widths 8, 16": (partial(network, (1, 28, 28), 8, 16), (1, 28, 28)),
    "32 x 32, widths 16, 32": (partial(network, (3, 32, 32), 16, 32), (3, 32, 32)),
    "cats and dogs": (cnn, (3, 32, 32)),
}


def step(module: nn.Module, shape: Shape, *, many: bool) -> float:
    """Milliseconds of one step of one model."""
    leading = (MODELS,) if many else ()
    states = [module.state_dict()] * MODELS
    batch = Batch(
        torch.randn(*leading, ROWS, *shape),
        torch.zeros(*leading, ROWS, dtype=torch.long),
        torch.full((*leading, ROWS), 1 / ROWS),
        torch.zeros(*leading, ROWS, 0),
    )
    descent = Descent(
        module,
        stack(states) if many else states[0],
        lambda outputs, labels, _: CrossEntropy().gradient(outputs, labels),
        SGD(momentum=0.9),
        many=many,
    )
    descent.step(batch, 0.0)
    start = time.perf_counter()
    for _ in range(STEPS):
        descent.step(batch, 0.0)
    return 1000 * (time.perf_counter() - start) / STEPS / (MODELS if many else 1)


def outputs(module: nn.Module, shape: Shape, *, many: bool) -> float:
    """Milliseconds of the outputs of one model."""
    rows, state = torch.randn(OUTPUT_ROWS, *shape), module.state_dict()
    states = stack([state] * MODELS)
    run = (
        partial(evaluate_many, module, states, rows)
        if many
        else partial(evaluate, module, state, rows)
    )
    run()
    start = time.perf_counter()
    for _ in range(3):
        run()
    return 1000 * (time.perf_counter() - start) / 3 / (MODELS if many else 1)


def main() -> None:
    """Prints the table."""
    print(f"{hardware()}, one thread; torch {torch.__version__}; {MODELS} models at once, steps of"
          f" {ROWS} rows, outputs of {OUTPUT_ROWS}; ms a model")  # fmt: skip
    print(f"{'':24s} {'products a row':>15s}  step: many, one, here    outputs: many, one, here")
    with threads(1):
        for name, (make, shape) in CASES.items():
            module, found = make(), []
            for measure in (step, outputs):
                with ExitStack() as stack:
                    for place in ("descent", "outputs"):
                        name_there = f"attribution.{place}.takes_channels_last"
                        stack.enter_context(patch(name_there, return_value=False))
                    found += [measure(module, shape, many=many) for many in (True, False)]
                found.append(measure(module, shape, many=False))
            count = multiplications(module, torch.zeros(1, *shape))
            times = "  ".join(f"{value:7.2f}" for value in found)
            print(f"{name:24s} {count:15,d}  {times}", flush=True)


if __name__ == "__main__":
    main()
