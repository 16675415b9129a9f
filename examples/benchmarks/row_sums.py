"""Sum the score rows of a forget set: our reader against a pread by hand and against zarr.

python examples/benchmarks/row_sums.py writes 50,000 x 20,000 scores in float16 (2 GB) twice, as a
store in the layout of datamodels (`score_block`) and as one plain file, and sums 10, 100 and 1,000
random rows of either, warm and cold (pages dropped before each query). The store has answered a
query before, so that its files are open; by hand the one file is opened each time. By hand is what
one would write for the plain file: tell the system of all rows, one pread a row, then the same
float32 sum. Ratios are medians over the repeats, on the same rows; the two take turns at being the
first, which finds the processor's caches emptied by what came before. Bytes are those that the disk
was asked for.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from stores import ArraySpec, Provenance, Store, StoreSpec, score_block, total, versions
from stores.halves import sum_halves
from unlearning.cost import hardware

SIZES = (10, 100, 1000)


def build(folder: Path, rows: int, targets: int) -> Store:
    """The same random scores as a store and as one plain file."""
    array = ArraySpec(("train", "target"), (rows, targets), "float16")
    block = score_block(targets, 1, "float16")
    spec = StoreSpec("scores", "target", block, {"scores": array})
    store = Store.create(folder / "store", spec, Provenance({}))
    plain = np.memmap(folder / "plain", np.float16, "w+", shape=(rows, targets))
    height = spec.chunks("scores")[0]
    for start in range(0, rows, height):
        random = np.random.default_rng(start)
        part = random.standard_normal((min(height, rows - start), targets), np.float32)
        plain[start : start + height] = part
    for number in range(spec.blocks):
        span = spec.span(number)
        with store.writing(number) as writer:
            for start in range(0, rows, height):
                writer.append("scores", np.array(plain[start : start + height, span]))
    plain.flush()
    os.sync()
    return store


def by_hand(file: Path, rows: np.ndarray, targets: int) -> np.ndarray:
    """Reads the rows of a plain file and sums them."""
    size = 2 * targets
    values = np.empty((len(rows), targets), np.float16)
    handle = os.open(file, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_RANDOM)
    for row in rows:
        os.posix_fadvise(handle, int(row) * size, size, os.POSIX_FADV_WILLNEED)
    for row, into in zip(rows, values, strict=True):
        os.preadv(handle, [into.view(np.uint8).data], int(row) * size)
    os.close(handle)
    return sum_halves(values)


def drop(folder: Path) -> None:
    """Takes all files of a folder out of the page cache."""
    for file in folder.rglob("*"):
        if file.is_file():
            handle = os.open(file, os.O_RDONLY)
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(handle)


def measured(query: Callable[[], object]) -> tuple[float, int]:
    """Seconds of a query and the bytes that it read from the disk."""
    before, start = _bytes_read(), time.perf_counter()
    query()
    return time.perf_counter() - start, _bytes_read() - before


def _bytes_read() -> int:
    for line in Path("/proc/self/io").read_text(encoding="ascii").splitlines():
        if line.startswith("read_bytes"):
            return int(line.split()[1])
    raise RuntimeError("expected read_bytes in /proc/self/io")


def compare(folder: Path, store: Store, count: int, repeats: int, *, cold: bool) -> None:
    """Prints medians and their ratio for one number of rows."""
    length, targets = store.spec.array("scores").shape
    file = folder / "plain"
    ours, hand = [], []
    for repeat in range(repeats + 1):
        rows = np.random.default_rng([count, repeat]).choice(length, count, replace=False)
        queries = [
            (ours, lambda rows=rows: total(store, "scores", rows)),
            (hand, lambda rows=rows: by_hand(file, rows, targets)),
        ]
        if cold:
            drop(folder)
        for taken, query in queries[:: 1 if repeat % 2 else -1]:
            taken.append(measured(query))
    ours, hand = ours[1:], hand[1:]  # the first query opens what later ones keep
    ratios = [a[0] / b[0] for a, b in zip(ours, hand, strict=True)]
    line = (
        f"{'cold' if cold else 'warm'}, {count:5d} rows: {1e3 * median(a[0] for a in ours):8.2f} ms"
    )
    line += f", by hand {1e3 * median(b[0] for b in hand):8.2f} ms, ratio {median(ratios):.2f}"
    line += f" ({min(ratios):.2f}-{max(ratios):.2f})"
    if cold:
        asked = count * targets * 2
        line += f"; bytes read over bytes asked for {median(a[1] for a in ours) / asked:.2f}"
        line += f", by hand {median(b[1] for b in hand) / asked:.2f}"
    print(line)


def against_zarr(store: Store, count: int, repeats: int) -> None:
    """Prints how much faster than zarr's own indexing the query is."""
    array, length = store.array("scores"), store.spec.array("scores").shape[0]
    ratios = []
    for repeat in range(repeats):
        rows = np.random.default_rng([count, repeat]).choice(length, count, replace=False)
        rows.sort()  # as zarr asks for it
        ours, _ = measured(lambda rows=rows: total(store, "scores", rows))
        theirs, _ = measured(
            lambda rows=rows: np.asarray(array.oindex[(rows,)]).sum(0, dtype=np.float32)
        )
        ratios.append(theirs / ours)
    told = f"{median(ratios):.0f} ({min(ratios):.0f}-{max(ratios):.0f})"
    print(f"warm, {count:5d} rows: zarr's own indexing takes {told} times as long")


def main() -> None:
    """Prints all ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--targets", type=int, default=20_000)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument(
        "--folder", default=None, help="where to write; a temporary one if not told"
    )
    options = parser.parse_args()
    print(f"{hardware()}; {versions('numpy', 'zarr')}; {options.repeats} repeats, median (range)")
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        store = build(Path(name), options.rows, options.targets)
        total(store, "scores", np.arange(0, options.rows, 50))
        print(f"{options.rows} x {options.targets} float16, chunks {store.spec.chunks('scores')}")
        for cold in (False, True):
            for count in SIZES:
                repeats = options.repeats if not cold else max(3, options.repeats // 2)
                compare(Path(name), store, count, repeats, cold=cold)
        against_zarr(store, 100, 5)


if __name__ == "__main__":
    main()
