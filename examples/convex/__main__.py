"""The convex suite: unlearning methods on ridge regressions, against closed forms.

python -m examples.convex takes four spectra, three regularisations, forget sets of random rows and
of rows that are alike, and 5 seeds of each. From the full model it takes 1,000 full-batch steps in
float64 with gradient descent on the retain rows, noisy gradient descent, ascent-descent, and
matching of oracle, first-order, leverage-corrected and group targets: the project's own methods,
their optimiser set to gradient descent at the rate 2 / (L + mu); and matching with its own
optimiser. It prints how far the weights end from the retrained solution (some minutes on one core),
and writes a page of figures where asked to.
"""

import argparse
import json
import time
from pathlib import Path

import torch

from examples.convex.methods import ADAM_RATES, ASCENT_EPOCHS, ASCENT_RATES, NOISE
from examples.convex.page import html, markdown
from examples.convex.suite import as_json, run
from examples.convex.words import aligned, details, findings
from stores import versions
from unlearning.cost import hardware


def main() -> None:
    """Runs the suite and prints its table."""
    parser = argparse.ArgumentParser(prog="python -m examples.convex", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="repeats")
    parser.add_argument("--steps", type=int, default=1000, help="budget of every method")
    parser.add_argument("--json", action="store_true", help="print the numbers as JSON")
    parser.add_argument("--out", help="also write a page of HTML")
    parser.add_argument("--markdown", help="also write sentences and table as Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    start = time.perf_counter()
    results = run(range(options.seeds), steps=options.steps)
    made = _made(options.seeds, options.steps, time.perf_counter() - start)
    if options.json:
        print(json.dumps({"made": made, "results": as_json(results)}))
    else:
        print("\n".join([made, "", *findings(results), "", aligned(details(results))]))
    for path, write in ((options.out, html), (options.markdown, markdown)):
        if path:
            Path(path).write_text(write(results, made), encoding="utf-8")


def _made(seeds: int, steps: int, seconds: float) -> str:
    numbers = ", ".join(f"{name} {version}" for name, version in versions("numpy", "torch").items())
    return (
        f"Made by `python -m examples.convex --seeds {seeds} --steps {steps}` in"
        f" {seconds / 60:.0f} min on one thread of {hardware()}, {numbers}. Gradient descent takes"
        f" steps of 2 / (L + mu). Noise: {NOISE:g} of the length of the weights a step. Of"
        f" ascent-descent the best of {_grid(ASCENT_EPOCHS)} ascents at {_grid(ASCENT_RATES)} of"
        f" that rate is shown, of Adam the best first rate of {_grid(ADAM_RATES)} of the largest"
        f" weight: both are chosen by looking at the retrained solution."
    )


def _grid(values: tuple[float, ...]) -> str:
    return " or ".join(f"{value:g}" for value in values)


if __name__ == "__main__":
    main()
