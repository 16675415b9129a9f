"""The rows that move a target's margin most: from what is kept beside the effects, or by a column.

python examples/benchmarks/top_rows.py writes a datamodel of 50,000 training rows x 5,000 targets in
float16 (500 MB) with 20 rows of either sign kept for each target, and asks for those of random
targets: of an open datamodel (warm), and of one that is opened anew after its files were dropped
from memory (cold). Beside it stands what the kept rows save: reading all effects on the target and
ranking them. The datamodel's numbers are random; how they were found makes no difference here.
"""

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch import Tensor

from attribution import LinearDatamodel
from attribution.effects import append, effect_arrays, object_rows, row_pieces, write_effects
from attribution.strongest import strongest
from examples.benchmarks.row_sums import drop
from stores import ArraySpec, Provenance, Store, StoreSpec, column, score_block, versions
from unlearning.cost import hardware

TOP = 20
BOUND = 6.0  # no standard normal number of so many is larger


def build(path: Path, rows: int, targets: int) -> Store:
    """A datamodel of random effects."""
    block = score_block(targets, 1, "float16")
    arrays = effect_arrays(
        *(rows, targets, 1, "float16"), top=TOP + 1, rows=object_rows(rows, block, "float16")
    )
    each = ArraySpec(("target", "output"), (targets, 1), "float32")
    arrays |= {"own": each, "slopes": each}
    spec = StoreSpec("datamodel", "target", block, arrays)
    store = Store.create(path, spec, Provenance({}), attributes={"shrink": [0.9, 0.6]})
    for number in range(spec.blocks):
        count = spec.span(number).stop - spec.span(number).start
        ones = np.ones((count, 1), np.float32)
        with store.writing(number) as writer:
            pieces = random_pieces(row_pieces(writer), count, number)
            write_effects(writer, pieces, torch.full((count, 1), BOUND), TOP + 1)
            append(writer, {"own": ones, "slopes": ones})
    return store.finalize()


def random_pieces(
    parts: Iterator[slice], targets: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Standard normal effects, which are effects on the margins too."""
    random = torch.Generator().manual_seed(seed)
    for part in parts:
        effects = torch.randn(part.stop - part.start, targets, 1, generator=random)
        yield effects.clamp_(-BOUND, BOUND), effects[:, :, 0]


def by_column(datamodel: LinearDatamodel, target: int) -> np.ndarray:
    """The same rows by all effects on the target."""
    margins = datamodel.effects(target) @ column(datamodel.store, "slopes", target)
    return strongest(margins[:, None], TOP)[0][0]


def milliseconds(query: Callable[[], object]) -> float:
    """Of one query."""
    start = time.perf_counter()
    query()
    return 1e3 * (time.perf_counter() - start)


def main() -> None:
    """Prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--targets", type=int, default=5_000)
    parser.add_argument("--queries", type=int, default=50)
    options = parser.parse_args()
    print(f"{hardware()}; {versions('numpy', 'torch')}; {options.queries} targets")
    print(f"{options.rows} rows x {options.targets} targets in float16, top {TOP} of either sign")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "datamodel"
        datamodel = LinearDatamodel(build(path, options.rows, options.targets))
        targets = np.random.default_rng(0).integers(options.targets, size=options.queries).tolist()
        datamodel.strongest(targets[0]), by_column(datamodel, targets[0])
        for kind in ("warm", "cold"):
            kept, whole = [], []
            for target in targets:
                if kind == "cold":
                    drop(path)
                    datamodel = LinearDatamodel.open(path)
                kept.append(milliseconds(lambda m=datamodel, t=target: m.strongest(t)))
                whole.append(milliseconds(lambda m=datamodel, t=target: by_column(m, t)))
            ratios = [column / few for column, few in zip(whole, kept, strict=True)]
            print(
                f"{kind}: median {median(kept):.2f} ms, worst {max(kept):.2f} ms; by the column"
                f" {median(whole):.1f} ms, {median(ratios):.0f} times as long"
            )


if __name__ == "__main__":
    main()
